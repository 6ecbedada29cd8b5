"""pass@k and majority@k of a base, and of base and adapter, on the same prompts with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import AdapterError
from quantkit.passk import majority_at_k, pass_at_k
from quantkit.rl.base import open_base, require_bound
from quantkit.rl.data import Row
from quantkit.rl.drawing import Asked, Reward, choose_template
from quantkit.rl.rewards.tags import DEFAULT, solution


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
    seed: int = 0, device: str = "cpu", weights: Sequence[float] = (),
) -> list[Rates]:  # fmt: skip
    """Draw n completions of each prompt, first without and then with the adapter.

    A completion is right if the sum of its rewards (times ``weights``) is above ``right_above``. Its answer, for majorities, is what stands
    between the solution tags, else the whole text. Raises AdapterError, RewardError.
    """
    if not ks or max(ks) > n or min(ks) < 1:
        raise AdapterError(f"k of {list(ks)} with {n} completions of each prompt", hint="every k lies between 1 and -n")
    opened = open_base(base, None, device)
    choose_template(opened, template, adapter)
    asked = Asked.of(opened, rows, system)

    def rates(name: str, model: Any) -> Rates:
        said = asked.draw(opened, model, n, completion, temperature, seed).texts
        return _rates(name, said, asked.totals(rewards, weights, said, n), n, ks, right_above)

    found = [rates(opened.name, opened.model)]
    if adapter is not None:
        from quantkit.rl.plugin_peft import with_adapter

        require_bound(adapter, opened)
        found.append(rates(f"{opened.name} and {adapter.name}", with_adapter(opened.model, str(adapter))))
    return found


def _rates(name: str, said: list[str], totals: list[float], n: int, ks: Sequence[int], right_above: float) -> Rates:
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
