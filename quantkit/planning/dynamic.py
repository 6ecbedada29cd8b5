"""The dynamic plan: spend a budget of bytes where it buys the most."""

from __future__ import annotations

import math
from collections.abc import Callable

from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.gguf_writer import padded
from quantkit.encoders import default_method
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError
from quantkit.formats import Format, get_format
from quantkit.planning.artifact import bits_per_weight, planned_bytes
from quantkit.planning.plan import Assignment, Pins, Plan
from quantkit.planning.policy import Policy
from quantkit.planning.solver import Choice, TooSlowError, solve_knapsack
from quantkit.planning.speed import Clock, Rates

# Bits per weight above which a dynamic plan carries a label of llama.cpp.
LABELS = (
    (0.0, "IQ1_S"),
    (1.7, "IQ1_M"),
    (1.95, "IQ2_XXS"),
    (2.2, "IQ2_XS"),
    (2.45, "IQ2_M"),
    (2.7, "Q2_K"),
    (3.1, "Q3_K_M"),
    (4.3, "Q4_K_M"),
    (5.3, "Q5_K_M"),
    (6.2, "Q6_K"),
    (7.5, "Q8_0"),
    (12.0, "BF16"),
)

CostOf = Callable[[TensorInfo, type[Format]], float]


def predicted_cost(sensitivity: Sensitivity) -> CostOf:
    """Cost of a tensor in a format from the analysis; a format it did not measure costs as the next coarser one that it did."""

    def cost(info: TensorInfo, fmt: type[Format]) -> float:
        entry = sensitivity.tensors.get(info.name)
        if entry is None:
            raise PlanError(f"the analysis knows nothing of {info.name}", hint="run `quantkit analyze` again")
        if fmt.name in entry.formats:
            return entry.formats[fmt.name].predicted_kld
        coarser = [c.predicted_kld for f, c in entry.formats.items() if get_format(f).bpw() <= fmt.bpw()]
        return min(coarser, default=max(c.predicted_kld for c in entry.formats.values()))

    return cost


def measured_formats(sensitivity: Sensitivity, info: TensorInfo) -> list[type[Format]]:
    """Formats whose cost the analysis knows for a tensor, from few to many bits."""
    entry = sensitivity.tensors.get(info.name)
    if entry is None:
        raise PlanError(f"the analysis knows nothing of {info.name}", hint="run `quantkit analyze` again")
    return sorted((get_format(name) for name in entry.formats), key=lambda fmt: (fmt.bpw(), fmt.name))


def total_prediction(sensitivity: Sensitivity, plan: Plan, checkpoint: Checkpoint) -> float:
    """Predicted KL divergence of a whole plan: the sum of its tensors' costs, composed as measured.

    composition = (factor, exponent): KLD = factor · Σ^exponent, fitted on plans of the calibration text.
    """
    cost = predicted_cost(sensitivity)
    total = sum(
        cost(info, get_format(plan.tensors[info.name].format)) for info in checkpoint.tensors.values() if info.quantizable
    )
    factor, exponent = sensitivity.composition
    return factor * total**exponent


def pins_of(sensitivity: Sensitivity) -> dict[str, Pins]:
    """Row and column of every super weight that the analysis found, by tensor."""
    out: dict[str, Pins] = {}
    for found in sensitivity.super_weights:
        out[found["tensor"]] = (*out.get(found["tensor"], ()), (found["row"], found["column"]))
    return out


def data_bytes(info: TensorInfo, fmt: type[Format]) -> int:
    """Bytes of a tensor in the file, padding included."""
    return padded(fmt.row_bytes(info.columns) * info.rows)


def dynamic_plan(
    checkpoint: Checkpoint,
    sensitivity: Sensitivity,
    stats: ActivationStats | None,
    budget_bytes: int,
    policy: Policy,
    *,
    budget: dict[str, object] | None = None,
    cost: CostOf | None = None,
    rates: Rates | None = None,
    least_speed: float | None = None,
) -> Plan:
    """The plan with the least predicted KL divergence whose file has at most ``budget_bytes``.

    rates: predict its tokens per second; least_speed: how many it must reach. Raises PlanError with the smallest
    and largest size that can be had if the budget cannot be met, or with the speed that can be had.
    """
    policy.check_used(checkpoint)
    cost = cost or predicted_cost(sensitivity)
    groups = policy.groups(checkpoint)
    clock = Clock(checkpoint, rates, budget_bytes) if rates is not None else None
    timed = clock if least_speed is not None else None
    options = [_options(group, policy, cost, sensitivity, timed) for group in groups]
    smallest, largest = _extremes(checkpoint, groups, options, stats)
    if budget_bytes < smallest.file_bytes:
        raise PlanError(
            f"a file of {budget_bytes:,} bytes is not possible",
            hint=f"sizes from {smallest.file_bytes:,} bytes ({smallest.bpw:.2f} bpw) to {largest.file_bytes:,} bytes "
            f"({largest.bpw:.2f} bpw) can be had",
        )
    rest = smallest.file_bytes - sum(min(c.nbytes for c in o) for o in options)
    chosen = _solve(options, budget_bytes - rest, budget_bytes, timed, least_speed)
    plan = _assemble(checkpoint, groups, chosen)
    plan.budget = dict(budget or {"file_bytes": budget_bytes})
    plan.bpw = bits_per_weight(checkpoint, plan)
    plan.label = next(label for least, label in reversed(LABELS) if plan.bpw >= least)
    plan.name = f"dynamic-{plan.bpw:.2f}bpw"
    plan.file_bytes = planned_bytes(checkpoint, plan, stats)
    plan.predicted_kld = total_prediction(sensitivity, plan, checkpoint)
    plan.constraints = policy.describe()
    if clock is not None:
        _record_speed(plan, checkpoint, clock, least_speed)
    _explain(plan, checkpoint, groups, options, chosen, policy, sensitivity)
    return plan


def size_range(
    checkpoint: Checkpoint, sensitivity: Sensitivity, stats: ActivationStats | None, policy: Policy
) -> tuple[Plan, Plan]:
    """The smallest and the largest plan that the policy allows, with their sizes."""
    groups, cost = policy.groups(checkpoint), predicted_cost(sensitivity)
    return _extremes(checkpoint, groups, [_options(g, policy, cost, sensitivity, None) for g in groups], stats)


def _extremes(
    checkpoint: Checkpoint, groups: list[list[TensorInfo]], options: list[list[Choice]], stats: ActivationStats | None
) -> tuple[Plan, Plan]:
    """The smallest and the largest plan."""
    plans = [_assemble(checkpoint, groups, [pick(o, key=lambda c: c.nbytes) for o in options]) for pick in (min, max)]
    for plan in plans:
        plan.bpw, plan.file_bytes = bits_per_weight(checkpoint, plan), planned_bytes(checkpoint, plan, stats)
    return plans[0], plans[1]


def _solve(
    options: list[list[Choice]], data_budget: int, budget_bytes: int, clock: Clock | None, least_speed: float | None
) -> list[Choice]:
    """The best choice of formats. Raises PlanError with the speed that can be had if ``least_speed`` cannot."""
    if clock is None or least_speed is None:
        return solve_knapsack(options, data_budget)
    try:
        return solve_knapsack(options, data_budget, 1 / least_speed - clock.fixed)
    except TooSlowError as error:
        raise PlanError(
            f"{least_speed:g} tokens/s is not possible in {budget_bytes:,} bytes: the fastest plan of at most this size decodes "
            f"{1 / (clock.fixed + error.seconds):.4g} tokens/s ({clock.rates.describe()})",
            hint="ask for fewer tokens/s or for another size",
        ) from None


def _record_speed(plan: Plan, checkpoint: Checkpoint, clock: Clock, least_speed: float | None) -> None:
    """Write the predicted speed into a plan, and what was asked."""
    plan.budget["tokens_per_second"] = clock.tokens_per_second(checkpoint, plan)
    plan.budget["speed_measured_on"] = clock.rates.describe()
    if least_speed is not None:
        plan.budget["min_tokens_per_second"] = least_speed
        plan.constraints.append(f"at least {least_speed:g} tokens/s: {clock.rates.describe()}")


def _options(
    group: list[TensorInfo], policy: Policy, cost: CostOf, sensitivity: Sensitivity, clock: Clock | None
) -> list[Choice]:
    allowed = [policy.allowed(info, measured_formats(sensitivity, info)) for info in group]
    shared = [fmt for fmt in allowed[0] if all(fmt in other for other in allowed[1:])]
    if not shared:
        raise PlanError(f"no format fits all of {', '.join(i.name for i in group)}, which must share one")
    if clock is not None:
        shared = clock.require(shared, group[0].name)
    return [
        Choice(
            fmt.name,
            sum(data_bytes(info, fmt) for info in group),
            sum(cost(info, fmt) for info in group),
            sum(clock.seconds(info, fmt) for info in group) if clock is not None else 0.0,
        )
        for fmt in shared
    ]


def _assemble(checkpoint: Checkpoint, groups: list[list[TensorInfo]], chosen: list[Choice]) -> Plan:
    formats = {info.name: choice.label for group, choice in zip(groups, chosen, strict=True) for info in group}
    tensors = {
        info.name: Assignment(formats.get(info.name, "F32"), reason="never quantized by llama.cpp")
        for info in checkpoint.tensors.values()
    }
    return Plan("dynamic-00.00bpw", "Q4_K_M", checkpoint.identity, tensors)


def _explain(
    plan: Plan, checkpoint: Checkpoint, groups: list[list[TensorInfo]], options: list[list[Choice]],
    chosen: list[Choice], policy: Policy, sensitivity: Sensitivity,
) -> None:  # fmt: skip
    """Say for every tensor why it got its format, in terms of what one step more or less would do."""
    total = max(sum(choice.cost for choice in chosen), 1e-30)
    for group, choices, choice in zip(groups, options, chosen, strict=True):
        ladder = sorted(choices, key=lambda c: c.nbytes)
        at = ladder.index(choice)
        words = [f"{100 * choice.cost / total:.1f} % of the predicted KLD"]
        if at > 0:
            below = ladder[at - 1]
            words.append(
                f"{below.label} would save {choice.nbytes - below.nbytes:,} bytes and add {_nats(below.cost - choice.cost)}"
            )
        if at + 1 < len(ladder):
            above = ladder[at + 1]
            words.append(
                f"{above.label} would take {above.nbytes - choice.nbytes:,} bytes to save {_nats(choice.cost - above.cost)}"
            )
        for info in group:
            why = list(words)
            if policy.kept(info) is not None:
                why = ["kept by request", *words]
            elif info.name in policy.super_weights:
                why = ["holds a super weight", *words]
            uncovered = sensitivity.tensors[info.name].uncovered_experts
            if uncovered:
                why.append(f"experts {uncovered} were not reached by the calibration text")
            method, pins = _method(sensitivity, info, choice.label), policy.super_weights.get(info.name, ())
            plan.tensors[info.name] = Assignment(choice.label, method, "; ".join(why), pins)


def _method(sensitivity: Sensitivity, info: TensorInfo, name: str) -> str:
    """The method that left the least error in the analysis; ggml's search for a format it did not measure."""
    measured = sensitivity.tensors[info.name].formats.get(name)
    return measured.method if measured is not None else default_method(get_format(name))


def _nats(value: float) -> str:
    return "nothing" if value <= 0 or math.isclose(value, 0) else f"{value:.2g} nats/token"
