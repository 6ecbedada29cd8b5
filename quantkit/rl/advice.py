"""What a run's log says about how it went, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Log = list[dict[str, Any]]
BROKEN_LOSS = 3.0  # nats a token: text that the model cannot follow at all
DEAD, MISMATCH, CLIPPED = 0.5, 0.1, 0.3


def mean(log: Log, name: str, part: slice = slice(None)) -> float | None:
    """Mean of a number over the steps that have it."""
    values = [row[name] for row in log if row.get(name) is not None][part]
    return sum(values) / len(values) if values else None


def advice_for_sft(log: Log) -> list[str]:
    """Advice after priming, none if all is well."""
    last = mean(log, "loss", slice(-3, None))
    if last is None or last < BROKEN_LOSS:
        return []
    return [
        f"The loss ends at {last:.2f} nats/token: check the template and that rows and base speak one language, or train longer."
    ]


def advice_for_grpo(log: Log) -> list[str]:
    """Advice after GRPO: dead groups, mismatch of the engine, completions that were cut off."""
    out = []
    dead, nothing = mean(log, "groups/dead"), mean(log, "groups/dead_nothing")
    if dead is not None and nothing is not None and dead > DEAD:
        if nothing > dead / 2:
            out.append(
                f"{nothing:.0%} of the groups had no reward above zero: the reward is wrong or too hard, or the base needs priming "
                "(`quantkit rl sft`). `quantkit rl check-rewards` tells the first."
            )
        else:
            out.append(
                f"{dead - nothing:.0%} of the groups had equal rewards throughout: the prompts are too easy. Take harder ones."
            )
    cut = mean(log, "completions/clipped_ratio")
    if cut is not None and cut > CLIPPED:
        out.append(f"{cut:.0%} of the completions did not end: raise --completion, or --mask-truncated.")
    apart = mean(log, "sampling/sampling_logp_difference/mean")
    if apart is not None and apart > MISMATCH:
        out.append(
            f"Engine and trainer differ by {apart:.2f} nats a token: weights of tokens are corrected, but the adapter may learn little. "
            "The engine torch has no mismatch."
        )
    return out


def advice_of_audits(rewards: Sequence[Any]) -> list[str]:
    """What audits of rewards (``rewards.audited``) found, none if all agree."""
    found = [getattr(getattr(reward, "audit", None), "raised", None) for reward in rewards]
    return [f"Batch {step}: {alarm}." for step, alarm in filter(None, found)]
