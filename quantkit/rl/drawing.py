"""Completions of rows, drawn outside of training, and what rewards make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.rl.base import Base
from quantkit.rl.data import Row, messages, read_template
from quantkit.rl.rewards.checked import checked
from quantkit.rl.rollouts import Sampling, TorchEngine

Reward = Callable[..., list[float | None]]


def choose_template(base: Base, template: Path | None, adapter: Path | None, marked: bool = False) -> None:
    """Give the base's tokenizer the chat template of a file, else the one that an adapter was trained with, else leave its own.

    marked: a file's must mark what the model says. Raises RewardError.
    """
    kept = None if adapter is None else adapter / "chat_template.jinja"
    if template is not None:
        base.tokenizer.chat_template = read_template(template, marked)
    elif kept is not None and kept.exists():
        base.tokenizer.chat_template = kept.read_text(encoding="utf-8")


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's and the model's own, as TRL's trainers have them."""
    found = model.generation_config.eos_token_id
    known = [] if found is None else [found] if isinstance(found, int) else list(found)
    return known if tokenizer.eos_token_id in known else [tokenizer.eos_token_id, *known]


@dataclass(frozen=True)
class Drawn:
    """Completions as texts, and whether each came to an end."""

    texts: list[str]
    ended: list[bool]


@dataclass(frozen=True)
class Asked:
    """Prompts of rows as rewards get them (texts or messages) and as token ids. chat: whether they are messages."""

    rows: list[Row]
    prompts: list[Any]
    ids: list[list[int]]
    chat: bool

    @classmethod
    def of(cls, base: Base, rows: list[Row], system: str | None) -> Asked:
        """The rows' prompts in the base's chat template, if it has one."""
        tokenizer = base.tokenizer
        chat = tokenizer.chat_template is not None
        prompts = [messages(row, system) if chat else row["prompt"] for row in rows]
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) if chat else p for p in prompts]
        return cls(rows, prompts, [tokenizer(text, add_special_tokens=not chat).input_ids for text in texts], chat)

    def draw(self, base: Base, model: Any, n: int, completion: int, temperature: float, seed: int, part: int = 0) -> Drawn:
        """n completions of every prompt, those of a prompt together. completion: tokens at most. part: of several draws."""
        ends, tokenizer = ends_of(base.model, base.tokenizer), base.tokenizer
        sampling = Sampling(completion, temperature, ends, tokenizer.pad_token_id, seed, part)
        found = TorchEngine().complete(model.eval(), [row for row in self.ids for _ in range(n)], sampling)
        texts = tokenizer.batch_decode(found.ids, skip_special_tokens=True)
        return Drawn(texts, [bool(ids) and ids[-1] in ends for ids in found.ids])

    def totals(self, rewards: Sequence[Reward], weights: Sequence[float], said: list[str], n: int) -> list[float]:
        """The weighted sum of the rewards of each completion, as in training. weights: none, or one for each reward.

        Raises RewardError for a reward that fails.
        """
        completions: list[Any] = [[{"role": "assistant", "content": text}] for text in said] if self.chat else list(said)
        names = {key for row in self.rows for key in row} - {"prompt", "completion"}
        columns = {key: [row.get(key) for row in self.rows for _ in range(n)] for key in names}
        given = [prompt for prompt in self.prompts for _ in range(n)]
        out = [0.0] * len(said)
        for reward, weight in zip(rewards, weights or [1.0] * len(rewards), strict=True):
            found = checked(reward)(prompts=given, completions=completions, **columns)
            out = [a + weight * (b or 0.0) for a, b in zip(out, found, strict=True)]
        return out
