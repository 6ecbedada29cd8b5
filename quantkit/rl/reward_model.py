"""Reward models: a scalar score on a packed base, learned from pairs of answers of which one is the better."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import read_json
from quantkit.errors import AdapterError, RewardError
from quantkit.rl.base import Base
from quantkit.rl.data import Row, conversation, messages, require_fields
from quantkit.rl.drawing import choose_template
from quantkit.rl.folder import RUN, RunFolder
from quantkit.rl.job import Job, Outcome, bound_weights, fingerprint, finish, open_for, require_other, save_adapter
from quantkit.rl.options import TrainOptions
from quantkit.rl.rewards.learned import token_ids

HELD = 10  # one of so many prompts is kept to measure on
FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class RewardModelOptions(TrainOptions):
    """batch, together: pairs. center: weight of the squared sum of a pair's scores, which keeps them near zero (Eisenstein et
    al. 2023, arXiv 2312.09244, equation 2); 0: none, 0.01 is usual."""

    batch: int = 2
    learning_rate: float = 1e-4
    center: float = 0.0


@dataclass(frozen=True)
class Ranked(Outcome):
    """held: pairs that training did not see. before, after: shares of them whose chosen answer scores higher."""

    held: int
    before: float
    after: float


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt with the better and with the worse answer."""

    chosen: list[int]
    rejected: list[int]


def reward_model(base: Path, rows: list[Row], out: Path, options: RewardModelOptions | None = None, *, adapter: Path | None = None,
                 template: Path | None = None, system: str | None = None, source: Path = Path("the data"), resume: bool = False,
                 force: bool = False) -> Ranked:  # fmt: skip
    """Train an adapter and a head that score answers, on rows with ``prompt``, ``chosen`` and ``rejected`` (texts or messages).

    The decoder stays packed. The loss is Bradley-Terry's, −log σ(chosen − rejected). The pairs of a tenth of the prompts, at
    least of one, are kept to measure on. adapter: begin with its pairs, a primed one's or another reward model's. source:
    what the rows are called in errors. Raises a QuantkitError.
    """
    options = options or RewardModelOptions()
    require_pairs(rows, source)
    job = _prepare(base, out, options, {"data": fingerprint(rows), "system": system}, adapter, template, resume, force)
    pairs = [_pair(job.base.tokenizer, row, system) for row in rows]
    _require_short(pairs, options.max_length, source)
    held = _held(rows, options.seed)
    apart = [pair for number, pair in enumerate(pairs) if number in held]
    from datasets import Dataset
    from trl import RewardConfig

    from quantkit.rl.plugin_reward_model import PairTrainer

    job.begin()
    arguments = job.arguments(
        RewardConfig, max_length=None, center_rewards_coefficient=options.center or None, disable_dropout=False
    )
    given = [{"chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for n, pair in enumerate(pairs) if n not in held]
    trainer = PairTrainer(
        model=job.model, args=arguments, train_dataset=Dataset.from_list(given), processing_class=job.base.tokenizer
    )
    before = ranked_right(job.model, apart, job.base, options.batch)
    outcome = finish(job, trainer, lambda job: save_adapter(job, job.base.model))  # pairs and head are on its decoder
    found = Ranked(**vars(outcome), held=len(apart), before=before, after=ranked_right(job.model, apart, job.base, options.batch))
    ranked = {"held": found.held, "before": found.before, "after": found.after}
    job.folder.write(RUN, {**read_json(out / RUN), "ranked": ranked})
    return found


def require_pairs(rows: list[Row], source: Path) -> None:
    """Raise RewardError for the first row that lacks a field or has a wrong one, and if there are fewer than two rows."""
    require_fields(rows, FIELDS, source)
    for number, row in enumerate(rows, 1):
        for name in FIELDS:
            if not isinstance(row[name], str) and not _are_messages(row[name]):
                raise RewardError(
                    f"{source}, row {number}: {name} is neither text nor messages",
                    hint='give a string or a list of {"role": ..., "content": ...}',
                )
        if _answer(row, "chosen") == _answer(row, "rejected"):
            raise RewardError(f"{source}, row {number}: chosen and rejected are the same", hint="leave the row out")
    if len(rows) < 2:
        raise RewardError(f"{source} has one pair", hint="give two or more: one is kept to measure on")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in value)


def _answer(row: Row, name: str) -> Any:
    """An answer as messages."""
    return conversation({"prompt": row["prompt"], "completion": row[name]}, None)["completion"]


def _prepare(base: Path, out: Path, options: RewardModelOptions, said: dict[str, Any], adapter: Path | None, template: Path | None,
             resume: bool, force: bool) -> Job:  # fmt: skip
    """Open the base and put a head and an adapter on its decoder. Raises a QuantkitError."""
    require_other(adapter, out)
    opened = open_for(base, options)
    from quantkit.modeling.training import save_memory
    from quantkit.rl.plugin_reward_model import new_scorer

    choose_template(opened, template, adapter)
    identity = {"method": "reward-model", "base": opened.digest, "options": options.as_json(),
                "template": opened.tokenizer.chat_template, **said}  # fmt: skip
    if adapter is not None:
        identity["adapter"] = bound_weights(adapter, opened)
    model = new_scorer(opened, options.lora, adapter)
    if options.save_memory:
        save_memory(model.get_base_model())
    return Job(RunFolder(out), opened, model, options, identity, resume, force)


def _pair(tokenizer: Any, row: Row, system: str | None) -> Pair:
    prompt = messages(row, system) if tokenizer.chat_template is not None else row["prompt"]
    return Pair(token_ids(tokenizer, prompt, row["chosen"]), token_ids(tokenizer, prompt, row["rejected"]))


def _require_short(pairs: list[Pair], limit: int, source: Path) -> None:
    """Raise AdapterError for a pair that is longer than ``limit`` tokens, or the same once it is tokens."""
    for number, pair in enumerate(pairs, 1):
        size = max(len(pair.chosen), len(pair.rejected))
        if size > limit:
            raise AdapterError(
                f"{source}, row {number} has {size} tokens, which exceeds {limit}",
                hint="raise --max-length, or leave the row out",
            )
        if pair.chosen == pair.rejected:
            raise RewardError(
                f"{source}, row {number}: chosen and rejected are the same to the template", hint="leave the row out"
            )


def _held(rows: list[Row], seed: int) -> set[int]:
    """Numbers of the rows to measure on: all those of every tenth prompt, drawn; of every tenth row if there is one prompt."""
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    if len(set(keys)) == 1:
        keys = [str(number) for number in range(len(rows))]
    known = sorted(set(keys))
    chosen = set(random.Random(seed).sample(known, -(-len(known) // HELD)))
    return {number for number, key in enumerate(keys) if key in chosen}


def ranked_right(model: Any, pairs: list[Pair], base: Base, batch: int) -> float:
    """Share of the pairs whose chosen answer scores higher than the rejected one."""
    from quantkit.rl.plugin_reward_model import scores

    sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    found = scores(model, sequences, base.tokenizer.pad_token_id, 2 * batch)
    return sum(a > b for a, b in zip(found[::2], found[1::2], strict=True)) / len(pairs)
