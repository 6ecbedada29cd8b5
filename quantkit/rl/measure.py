"""pass@k and majority@k of a base, and of base and adapter, on the same prompts with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import AdapterError
from quantkit.rl.base import open_base, require_bound
from quantkit.rl.data import Row, messages, read_template
from quantkit.rl.passk import majority_at_k, pass_at_k
from quantkit.rl.rewards.checked import checked
from quantkit.rl.rewards.tags import DEFAULT, solution
from quantkit.rl.rollouts import Sampling, TorchEngine

Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Rates:
    """Means over prompts, by k; errors: standard errors over prompts. reward: mean of all completions."""

    name: str
    pass_at: dict[int, float]
    pass_errors: dict[int, float]
    majority_at: dict[int, float]
    reward: float


def measure(
    base: Path, rows: list[Row], rewards: Sequence[Reward], n: int, ks: Sequence[int], *, adapter: Path | None = None,
    template: Path | None = None, system: str | None = None, right_above: float = 0.0, completion: int = 256, temperature: float = 1.0,
    seed: int = 0, device: str = "cpu",
) -> list[Rates]:  # fmt: skip
    """Draw n completions of each prompt, first without and then with the adapter.

    A completion is right if the sum of its rewards is above ``right_above``. Its answer, for majorities, is what stands
    between the solution tags, else the whole text. Raises AdapterError, RewardError.
    """
    if not ks or max(ks) > n or min(ks) < 1:
        raise AdapterError(f"k of {list(ks)} with {n} completions of each prompt", hint="every k lies between 1 and -n")
    opened = open_base(base, None, device)
    tokenizer = opened.tokenizer
    primed = adapter / "chat_template.jinja" if adapter is not None else None
    if template is not None:
        tokenizer.chat_template = read_template(template, False)
    elif primed is not None and primed.exists():
        tokenizer.chat_template = primed.read_text(encoding="utf-8")
    chat = tokenizer.chat_template is not None
    prompts = [messages(row, system) if chat else row["prompt"] for row in rows]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) if chat else p for p in prompts]
    ids = [tokenizer(text, add_special_tokens=not chat).input_ids for text in texts]
    sampling = Sampling(completion, temperature, [tokenizer.eos_token_id], tokenizer.pad_token_id, seed)

    def rates(name: str, model: Any) -> Rates:
        drawn = TorchEngine().complete(model.eval(), [row for row in ids for _ in range(n)], sampling)
        said = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
        return _rates(name, rows, prompts, said, [checked(reward) for reward in rewards], n, ks, right_above, chat)

    found = [rates(opened.name, opened.model)]
    if adapter is not None:
        from quantkit.rl.plugin_peft import with_adapter

        require_bound(adapter, opened)
        found.append(rates(f"{opened.name} and {adapter.name}", with_adapter(opened.model, str(adapter))))
    return found


def _rates(
    name: str, rows: list[Row], prompts: list[Any], said: list[str], rewards: Sequence[Reward], n: int, ks: Sequence[int],
    right_above: float, chat: bool,
) -> Rates:  # fmt: skip
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in said] if chat else list(said)
    names = {key for row in rows for key in row} - {"prompt", "completion"}
    columns = {key: [row.get(key) for row in rows for _ in range(n)] for key in names}
    given = [prompt for prompt in prompts for _ in range(n)]
    totals = [0.0] * len(said)
    for reward in rewards:
        totals = [a + (b or 0.0) for a, b in zip(totals, reward(prompts=given, completions=completions, **columns), strict=True)]
    right = [total > right_above for total in totals]
    answers = [solution(text, DEFAULT) or text.strip() or None for text in said]
    groups = [slice(start, start + n) for start in range(0, len(said), n)]
    each = {k: [pass_at_k(n, sum(right[part]), k) for part in groups] for k in ks}
    most = {k: [majority_at_k(answers[part], right[part], k) for part in groups] for k in ks}
    return Rates(
        name, {k: _mean(v) for k, v in each.items()}, {k: _error(v) for k, v in each.items()},
        {k: _mean(v) for k, v in most.items()}, _mean(totals),
    )  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    """Standard error of the mean; 0 for one value."""
    mean = _mean(values)
    return (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values)) ** 0.5
