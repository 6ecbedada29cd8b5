"""Rejection sampling: completions that the rewards accept become rows for another round of supervised training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.files import refuse_existing, require_folder
from quantkit.errors import AdapterError
from quantkit.progress import Progress
from quantkit.rl.base import open_base, require_bound
from quantkit.rl.data import Row
from quantkit.rl.drawing import Asked, Drawn, Reward, choose_template
from quantkit.rl.rollouts import BATCH


@dataclass(frozen=True)
class Sampled:
    """Counts of completions drawn, of those that ended, of those of them that the rewards accept, and of rows written; prompts:
    with a row. mean: reward of all that were drawn."""

    drawn: int
    ended: int
    accepted: int
    rows: int
    prompts: int
    mean: float


def sample(
    base: Path, rows: list[Row], rewards: Sequence[Reward], out: Path, n: int = 8, *, adapter: Path | None = None,
    template: Path | None = None, system: str | None = None, right_above: float = 0.0, keep: int = 1, completion: int = 256,
    temperature: float = 1.0, seed: int = 0, device: str = "cpu", weights: Sequence[float] = (), force: bool = False,
    progress: Progress | None = None,
) -> Sampled:  # fmt: skip
    """Draw n completions of each prompt and write the best ``keep`` of those whose rewards sum up to more than ``right_above``.

    Rows have the prompt's fields, ``completion`` and ``reward``; no prompt has the same completion twice, and none that was cut
    off is kept. As in STaR (arXiv 2203.14465) and RAFT (arXiv 2304.06767). If something fails, what was found so far is in
    OUT.part. Raises AdapterError if nothing is accepted, RewardError, OutputError.
    """
    refuse_existing(out, force)
    require_folder(out)
    opened = open_base(base, None, device)
    choose_template(opened, template, adapter)
    model = opened.model
    if adapter is not None:
        from quantkit.rl.plugin_peft import with_adapter

        require_bound(adapter, opened)
        model = with_adapter(model, str(adapter))
    totals: list[float] = []
    kept: list[Row] = []
    ended = accepted = 0
    part = out.with_name(f"{out.name}.part")
    task = (progress or Progress()).task("sample", total=len(rows), unit="prompts")
    with part.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), max(1, BATCH // n)):
            some = rows[start : start + max(1, BATCH // n)]
            asked = Asked.of(opened, some, system)
            drawn = asked.draw(opened, model, n, completion, temperature, seed, start)
            found = asked.totals(rewards, weights, drawn.texts, n)
            chosen = [row for place in range(len(some)) for row in _best(some[place], drawn, found, place, n, right_above, keep)]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
            file.flush()
            kept += chosen
            totals += found
            ended += sum(drawn.ended)
            accepted += sum(total > right_above and end for total, end in zip(found, drawn.ended, strict=True))
            task.advance(len(some))
    task.done()
    if not kept:
        part.unlink()
        raise AdapterError(
            f"none of {len(totals)} completions ended and got more than {right_above:g} (the best got {max(totals):.3g}, {ended} ended)",
            hint="draw more (-n), raise --completion, prime the model first (`quantkit rl sft`), or lower --right-above",
        )
    os.replace(part, out)
    answered = {json.dumps(row["prompt"], sort_keys=True) for row in kept}
    return Sampled(len(totals), ended, accepted, len(kept), len(answered), sum(totals) / len(totals))


def _best(row: Row, drawn: Drawn, totals: list[float], place: int, n: int, right_above: float, keep: int) -> list[Row]:
    """Rows of one prompt's completions, place · n to place · n + n."""
    group = range(place * n, place * n + n)
    whole = [k for k in group if drawn.ended[k]]
    return best(row, [drawn.texts[k] for k in whole], [totals[k] for k in whole], right_above, keep)


def best(row: Row, said: list[str], totals: list[float], right_above: float, keep: int) -> list[Row]:
    """The accepted completions of a row, the best ones first, the shorter one of two that are as good."""
    found = {text: total for text, total in zip(said, totals, strict=True) if total > right_above}
    order = sorted(found, key=lambda text: (-found[text], len(text), text))
    return [{**row, "completion": text, "reward": found[text]} for text in order[:keep]]
