"""The refit loop: measure a plan for real, correct what the planner believes, solve again, then try swaps.

A plan is decoded and its KL divergence measured on calibration text that neither the statistics nor the probes saw.
Then each group of tensors (a role in a third of the model's depth) is given back its original weights, one group at
a time: what that saves is the group's true cost inside this plan, with all that its errors do to those of others. The
costs of its tensors are scaled towards it and the plan is solved again; a new plan stays only if it measures better.
At low budgets single steps up, paid for by steps down elsewhere, are measured too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantkit.analysis.group_probes import group_key
from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.probing import decoded
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import Format, get_format
from quantkit.modeling.products import fast_float32
from quantkit.planning.artifact import bits_per_weight, planned_bytes
from quantkit.planning.dynamic import CostOf, data_bytes, predicted_cost, total_prediction
from quantkit.planning.plan import Assignment, Plan
from quantkit.progress import Progress

ROUNDS = 3
STEP = 0.7  # of the logarithm of the correction, taken at a time
SWAPS = 12  # pairs measured at most
LOW_BPW = 4.0  # budgets below are worth swaps

Values = dict[str, npt.NDArray[np.float32]]
Solve = Callable[[CostOf], Plan]
Allowed = Callable[[TensorInfo], set[str]]
Step = tuple[str, str]  # tensor and format


@dataclass
class Refit:
    """What the loop found. history: (what was tried, measured KL divergence in nats per token, kept)."""

    plan: Plan
    measured: float
    history: list[tuple[str, float, bool]] = field(default_factory=list)


class Judge:
    """Measures plans on one text; tensors are decoded once for each format and method."""

    def __init__(self, checkpoint: Checkpoint, stats: ActivationStats, windows: npt.NDArray[np.int64]) -> None:
        self._checkpoint, self._stats = checkpoint, stats
        self._model = ProbeModel(checkpoint, windows)
        self._known: dict[tuple[str, str, str], npt.NDArray[np.float32]] = {}

    def values(self, plan: Plan) -> Values:
        """Every quantizable tensor as the plan's format gives it back."""
        out = {}
        for info in self._checkpoint.tensors.values():
            if info.quantizable:
                entry = plan.tensors[info.name]
                key = (info.name, entry.format, entry.method)
                if key not in self._known:
                    self._known[key] = decoded(self._checkpoint, self._stats, *key)
                out[info.name] = self._known[key]
        return out

    def measure(self, values: Values) -> float:
        """Mean KL divergence, nats per token."""
        return self._model.divergence(values)


@fast_float32()
def refit(
    checkpoint: Checkpoint, sensitivity: Sensitivity, stats: ActivationStats, windows: npt.NDArray[np.int64], solve: Solve,
    allowed: Allowed | None = None, progress: Progress | None = None,
) -> Refit:  # fmt: skip
    """The best plan that the loop finds.

    solve: makes a plan within the budget from a cost function. allowed: names of the formats that a tensor may have
    by itself; None where tensors may not be exchanged one by one.
    """
    judge = Judge(checkpoint, stats, windows)
    base = predicted_cost(sensitivity)
    factors: dict[tuple[str, int], float] = {}

    def cost(info: TensorInfo, fmt: type[Format]) -> float:
        return factors.get(group_key(checkpoint, info), 1.0) * base(info, fmt)

    best = solve(base)
    found = Refit(best, judge.measure(judge.values(best)))
    found.history.append(("the analysis's plan", found.measured, True))
    task = (progress or Progress()).task("refit", total=ROUNDS, unit="rounds")
    for number in range(ROUNDS):
        _correct(checkpoint, judge, found, cost, factors)
        plan = solve(cost)
        task.advance()
        if _formats(plan) == _formats(found.plan):
            break
        measured = judge.measure(judge.values(plan))
        kept = measured < found.measured
        found.history.append((f"round {number + 1}: costs corrected by role and depth", measured, kept))
        if not kept:
            break
        found.plan, found.measured = plan, measured
    task.done()
    if found.plan.bpw < LOW_BPW and allowed is not None:
        _swap(checkpoint, sensitivity, judge, found, _exchanges(checkpoint, sensitivity, found.plan, cost, allowed))
        found.plan.bpw = bits_per_weight(checkpoint, found.plan)
        found.plan.file_bytes = planned_bytes(checkpoint, found.plan, stats)
        found.plan.predicted_kld = total_prediction(sensitivity, found.plan, checkpoint)
    return found


def _correct(checkpoint: Checkpoint, judge: Judge, found: Refit, cost: CostOf, factors: dict[tuple[str, int], float]) -> None:
    """Move the factor of every group towards what the group really costs in the plan at hand."""
    values = judge.values(found.plan)
    groups: dict[tuple[str, int], list[TensorInfo]] = {}
    for name in values:
        info = checkpoint.info(name)
        groups.setdefault(group_key(checkpoint, info), []).append(info)
    true, believed = {}, {}
    for key, members in groups.items():
        names = {info.name for info in members}
        rest = {name: value for name, value in values.items() if name not in names}
        true[key] = max(found.measured - judge.measure(rest), 0.0) if rest else found.measured
        believed[key] = sum(cost(info, get_format(found.plan.tensors[info.name].format)) for info in members)
    scale = sum(true.values()) / max(sum(believed.values()), 1e-30)  # only shares matter to the solver
    for key in groups:
        if believed[key] > 0 and true[key] > 0 and scale > 0:
            ratio = true[key] / (scale * believed[key])
            factors[key] = factors.get(key, 1.0) * math.exp(STEP * math.log(min(max(ratio, 0.25), 4.0)))


def _swap(
    checkpoint: Checkpoint, sensitivity: Sensitivity, judge: Judge, found: Refit, exchanges: list[tuple[Step, Step]]
) -> None:
    """Measure the most promising exchanges of one step up for one step down, and keep those that help."""
    for up, down in exchanges[:SWAPS]:
        touched = {up[0]: up[1], down[0]: down[1]}
        if any(found.plan.tensors[name].format == fmt for name, fmt in touched.items()):
            continue
        trial = Plan(**{**found.plan.__dict__, "tensors": dict(found.plan.tensors)})
        for name, fmt in touched.items():
            entry = sensitivity.tensors[name].formats[fmt]
            trial.tensors[name] = Assignment(fmt, entry.method, "measured better in an exchange of bytes")
        if _bytes(checkpoint, trial) > _bytes(checkpoint, found.plan):
            continue
        measured = judge.measure(judge.values(trial))
        kept = measured < found.measured
        found.history.append((f"{up[0]} to {up[1]}, {down[0]} to {down[1]}", measured, kept))
        if kept:
            found.plan, found.measured = trial, measured


def _exchanges(
    checkpoint: Checkpoint, sensitivity: Sensitivity, plan: Plan, cost: CostOf, allowed: Allowed
) -> list[tuple[Step, Step]]:
    """Pairs (tensor, finer format), (tensor, coarser format) that fit the bytes, least predicted loss first."""
    ups, downs = [], []
    for name, entry in sensitivity.tensors.items():
        info, now = checkpoint.info(name), get_format(plan.tensors[name].format)
        for fmt in (get_format(f) for f in entry.formats if f in allowed(info)):
            size = data_bytes(info, fmt) - data_bytes(info, now)
            change = cost(info, fmt) - cost(info, now)
            if size > 0 and change < 0:
                ups.append((name, fmt.name, size, change))
            elif size < 0:
                downs.append((name, fmt.name, size, change))
    pairs = [
        (a[3] + b[3], (a[0], a[1]), (b[0], b[1]))
        for a in ups for b in downs if a[0] != b[0] and a[2] + b[2] <= 0
    ]  # fmt: skip
    return [(up, down) for _, up, down in sorted(pairs, key=lambda pair: pair[0])]


def _formats(plan: Plan) -> dict[str, str]:
    return {name: entry.format for name, entry in plan.tensors.items()}


def _bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    return sum(data_bytes(info, get_format(plan.tensors[info.name].format)) for info in checkpoint.tensors.values())
