"""Multiple-choice knapsack: one format for each group of tensors, least total cost within the bytes.

Solved exactly by HiGHS through scipy.optimize.milp: minimize Σ cost·x subject to Σ bytes·x ≤ budget and
Σ_formats x = 1 for each group, x binary.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quantkit.errors import PlanError


@dataclass(frozen=True)
class Choice:
    """One way to write a group: its label, bytes in the file and predicted cost (nats per token)."""

    label: str
    nbytes: int
    cost: float


def undominated(choices: list[Choice]) -> list[Choice]:
    """Choices sorted by bytes, without those that cost no less than a smaller one."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def solve_knapsack(groups: list[list[Choice]], budget: int) -> list[Choice]:
    """The choice of each group with the least total cost within ``budget`` bytes.

    Raises PlanError with the smallest and largest possible size if the budget cannot be met.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    kept = [undominated(choices) for choices in groups]
    smallest = sum(choices[0].nbytes for choices in kept)
    if smallest > budget:
        raise PlanError(f"the budget of {budget:,} bytes of tensor data is below the smallest possible {smallest:,}")
    flat = [(g, choice) for g, choices in enumerate(kept) for choice in choices]
    # Bytes are scaled so that HiGHS's tolerances are far below one alignment unit.
    sizes = np.array([choice.nbytes for _, choice in flat], float) / 32
    costs = np.array([choice.cost for _, choice in flat], float)
    scale = max(costs.max(initial=0.0), 1e-300)
    one_each = csr_array((np.ones(len(flat)), ([g for g, _ in flat], range(len(flat)))), shape=(len(kept), len(flat)))
    with _quiet_stdout():
        result = milp(
            costs / scale,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :], ub=budget / 32)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
    if result.x is None or result.status not in (0, 1):
        raise PlanError(f"no plan found within {budget:,} bytes ({result.message})")
    chosen = [choice for x, (_, choice) in zip(result.x, flat, strict=True) if x > 0.5]
    while sum(c.nbytes for c in chosen) > budget:  # never trust a tolerance: take back the cheapest step
        steps = [(down.cost - now.cost, g, down) for g, now in enumerate(chosen) for down in kept[g] if down.nbytes < now.nbytes]
        _, g, down = min(steps, key=lambda step: step[0])
        chosen[g] = down
    return _spend_rest(kept, chosen, budget)


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


def _spend_rest(groups: list[list[Choice]], chosen: list[Choice], budget: int) -> list[Choice]:
    """Use what the solver's tolerance left: the best single step up that fits, as long as there is one."""
    chosen = list(chosen)
    used = sum(c.nbytes for c in chosen)
    while True:
        best: tuple[float, int, Choice] | None = None
        for g, current in enumerate(chosen):
            for option in groups[g]:
                gain = current.cost - option.cost
                if gain > 0 and used + option.nbytes - current.nbytes <= budget and (best is None or gain > best[0]):
                    best = (gain, g, option)
        if best is None:
            return chosen
        used += best[2].nbytes - chosen[best[1]].nbytes
        chosen[best[1]] = best[2]
