"""Multiple-choice knapsack: one format for each group of tensors, least total cost within the bytes.

Solved exactly by HiGHS through scipy.optimize.milp: minimize Σ cost·x subject to Σ bytes·x ≤ budget, where asked
Σ seconds·x ≤ limit too, and Σ_formats x = 1 for each group, x binary.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from quantkit.errors import PlanError

TRIES = 8  # solutions that miss a limit by HiGHS's tolerance before the fastest one is taken
ROUNDING = 1 + 1e-12  # of a sum of seconds


@dataclass(frozen=True)
class Choice:
    """One way to write a group: its label, bytes in the file, predicted cost (nats per token), seconds per token."""

    label: str
    nbytes: int
    cost: float
    seconds: float = 0.0


class TooSlowError(PlanError):
    """The time limit cannot be met within the bytes. seconds: of the fastest choice that fits."""

    def __init__(self, seconds: float, limit: float) -> None:
        self.seconds = seconds
        super().__init__(f"no choice within the bytes takes at most {limit:.4g} s per token: the fastest takes {seconds:.4g} s")


def undominated(choices: list[Choice], timed: bool = False) -> list[Choice]:
    """Choices sorted by bytes, without those that cost no less than a smaller one (that is no slower, if ``timed``)."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.cost, c.seconds)):
        if not any(k.cost <= choice.cost and (not timed or k.seconds <= choice.seconds) for k in kept):
            kept.append(choice)
    return kept


def solve_knapsack(groups: list[list[Choice]], budget: int, seconds: float | None = None) -> list[Choice]:
    """The choice of each group with the least total cost within ``budget`` bytes and ``seconds`` per token.

    Raises PlanError with the smallest possible size if the budget cannot be met, TooSlowError with the least
    time within the budget if the limit of seconds cannot be met.
    """
    kept = [undominated(choices, seconds is not None) for choices in groups]
    smallest = sum(choices[0].nbytes for choices in kept)
    if smallest > budget:
        raise PlanError(f"the budget of {budget:,} bytes of tensor data is below the smallest possible {smallest:,}")
    chosen = _in_bytes(kept, budget) if seconds is None else _in_both(kept, budget, seconds)
    return _spend_rest(kept, chosen, budget, seconds)


def fastest(groups: list[list[Choice]], budget: int) -> list[Choice]:
    """The choice of each group with the least total time within ``budget`` bytes."""
    by_time = [[replace(c, cost=c.seconds) for c in choices] for choices in groups]
    chosen = solve_knapsack(by_time, budget)
    return [choices[timed.index(c)] for choices, timed, c in zip(groups, by_time, chosen, strict=True)]


def _in_bytes(kept: list[list[Choice]], budget: int) -> list[Choice]:
    """The optimum within the bytes."""
    chosen = _solve(kept, budget, None)
    if chosen is None:
        raise PlanError(f"no plan found within {budget:,} bytes")
    while sum(c.nbytes for c in chosen) > budget:  # never trust a tolerance: take back the cheapest step
        steps = [(down.cost - now.cost, g, down) for g, now in enumerate(chosen) for down in kept[g] if down.nbytes < now.nbytes]
        _, g, down = min(steps, key=lambda step: step[0])
        chosen[g] = down
    return chosen


def _in_both(kept: list[list[Choice]], budget: int, seconds: float) -> list[Choice]:
    """The optimum within bytes and seconds; what HiGHS takes too much by its tolerance is taken off the limits."""
    quickest = fastest(kept, budget)
    least = sum(c.seconds for c in quickest)
    if least > seconds * ROUNDING:
        raise TooSlowError(least, seconds)
    bytes_left, seconds_left = budget, seconds
    for _ in range(TRIES):
        chosen = _solve(kept, bytes_left, seconds_left)
        if chosen is None:
            break
        too_large = sum(c.nbytes for c in chosen) - budget
        too_slow = sum(c.seconds for c in chosen) - seconds * ROUNDING
        if too_large <= 0 and too_slow <= 0:
            return chosen
        bytes_left -= max(too_large, 0)
        seconds_left -= 2 * max(too_slow, 0.0)
    return quickest


def _solve(kept: list[list[Choice]], budget: int, seconds: float | None) -> list[Choice] | None:
    """HiGHS's optimum, None if it finds nothing. Limits hold up to its tolerance of about 1e-6."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(g, choice) for g, choices in enumerate(kept) for choice in choices]
    costs = np.array([choice.cost for _, choice in flat], float)
    one_each = csr_array((np.ones(len(flat)), ([g for g, _ in flat], range(len(flat)))), shape=(len(kept), len(flat)))
    # Bytes are scaled so that HiGHS's tolerances are far below one alignment unit.
    sizes = np.array([choice.nbytes for _, choice in flat], float) / 32
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :], ub=budget / 32)]
    if seconds is not None:
        times = np.array([choice.seconds for _, choice in flat], float)
        unit = max(float(times.max(initial=0.0)), 1e-300) / 1e6
        constraints.append(LinearConstraint(times[None, :] / unit, ub=seconds / unit))
    with _quiet_stdout():
        result = milp(
            costs / max(costs.max(initial=0.0), 1e-300),
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
    if result.x is None or result.status not in (0, 1):
        return None
    return [choice for x, (_, choice) in zip(result.x, flat, strict=True) if x > 0.5]


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS prints debugging lines straight to file descriptor 1, where results go: silence it."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C's buffer too, while it still goes nowhere
        os.dup2(saved, 1)
        os.close(saved)


def _spend_rest(groups: list[list[Choice]], chosen: list[Choice], budget: int, seconds: float | None) -> list[Choice]:
    """Use what the solver's tolerance left: the best single step up that fits, as long as there is one."""
    chosen = list(chosen)
    used = sum(c.nbytes for c in chosen)
    room = float("inf") if seconds is None else seconds * ROUNDING
    while True:
        best: tuple[float, int, Choice] | None = None
        for g, current in enumerate(chosen):
            for option in groups[g]:
                gain = current.cost - option.cost
                fits = used + option.nbytes - current.nbytes <= budget
                if seconds is not None and fits:
                    fits = sum(c.seconds for c in chosen) + option.seconds - current.seconds <= room
                if gain > 0 and fits and (best is None or gain > best[0]):
                    best = (gain, g, option)
        if best is None:
            return chosen
        used += best[2].nbytes - chosen[best[1]].nbytes
        chosen[best[1]] = best[2]
