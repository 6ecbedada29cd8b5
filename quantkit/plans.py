"""Which plan a user means: made for a budget, of a known mix, or read from a file."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from quantkit.analysis.imatrix import load_stats
from quantkit.analysis.run import ANALYSIS, IMATRIX, attach_moments, work_directory
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.analysis.windows import refit_windows
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.files import write_text
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError, QuantkitError
from quantkit.planning.artifact import bits_per_weight, planned_bytes
from quantkit.planning.budget import Request, budget_bytes
from quantkit.planning.dynamic import CostOf, dynamic_plan, measured_formats, pins_of, total_prediction
from quantkit.planning.plan import Plan
from quantkit.planning.policy import Policy
from quantkit.planning.rules import Rules
from quantkit.planning.standard import ALIASES, BASE, standard_plan, uniform_plan
from quantkit.quantizer.refit import refit
from quantkit.session import Options, analysis_of, text_behind, without_outliers

PLAN = "plan.json"
REFIT_EFFORT = 5


def make_dynamic(checkpoint: Checkpoint, request: Request, rules: Rules, options: Options) -> tuple[Plan, ActivationStats]:
    """The dynamic plan for a budget, written to the work directory; runs the analysis where it is missing.

    Raises PlanError with the sizes that can be had if the budget is impossible.
    """
    policy, speed = rules.policy(checkpoint), rules.speed
    if request.fit is not None or request.size is not None:
        budget_bytes(request, checkpoint, None)  # what is impossible is refused before the analysis
    rates = speed.find_rates(options.progress) if speed is not None else None
    work = work_directory(checkpoint.path, options.work)
    checkpoint, options = without_outliers(checkpoint, options)
    sensitivity, stats = analysis_of(checkpoint, options)
    protect(policy, checkpoint, sensitivity)
    size, asked = budget_bytes(request, checkpoint, stats)
    if rules.adapter_bytes:
        size, asked = size - rules.adapter_bytes, {**asked, "adapter_bytes": rules.adapter_bytes}

    def solve(cost: CostOf | None = None) -> Plan:
        return dynamic_plan(
            checkpoint, sensitivity, stats, size, policy, budget={**asked, "budget_bytes": size}, rates=rates,
            least_speed=speed.least if speed is not None else None, cost=cost,
        )  # fmt: skip

    made = solve()
    if options.effort >= REFIT_EFFORT and sensitivity.estimator == "probes":
        windows = refit_windows(checkpoint, text_behind(checkpoint, options, sensitivity.calibration))

        def allowed(info: TensorInfo) -> set[str]:
            return {fmt.name for fmt in policy.allowed(info, measured_formats(sensitivity, info))}

        free = None if speed is not None or policy.fused else allowed
        found = refit(checkpoint, sensitivity, stats, windows, solve, free, options.progress)
        made = found.plan
        made.budget["measured_kld"] = found.measured
        made.constraints += [
            f"{what}: measured KLD {kld:.4g} nats/token{'' if kept else ', not kept'}" for what, kld, kept in found.history
        ]
    write_text(work / PLAN, made.to_json())
    return made, stats


def protect(policy: Policy, checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    """Add to the rules what the analysis and the model ask for."""
    policy.super_weights = pins_of(sensitivity)
    policy.tied_heads = frozenset({"token_embd.weight"} if checkpoint.tied else ())


def resolve_plan(
    checkpoint: Checkpoint, plan: str | Plan, request: Request, rules: Rules, use_importance: bool, options: Options
) -> tuple[Plan, ActivationStats | None]:
    """The plan that a name, a file or an object stands for, and the statistics it is written with.

    Raises PlanError if there is none of this name, or if a size or rules are asked of a plan that has its own.
    """
    if (rules.given or request.given) and plan != "dynamic":
        raise PlanError(
            f"--plan {plan if isinstance(plan, str) else plan.name} has its own size",
            hint="leave out --bpw, --size, --fit, --like, --keep, --floor, --formats, --min-tokens-per-second and --adapter, or use --plan dynamic",
        )
    if isinstance(plan, Plan):
        return _given_plan(checkpoint, plan, use_importance, options)
    if plan == "dynamic":
        if not use_importance:
            raise PlanError("--no-imatrix goes with standard and uniform plans", hint="a dynamic plan is made from statistics")
        return make_dynamic(checkpoint, request, rules, options)
    kind, _, name = plan.rpartition(":")
    if not kind and (name.upper() in BASE or name.upper() in ALIASES):
        kind = "standard"
    if kind not in ("standard", "uniform"):
        if not Path(plan).exists():
            raise PlanError(f"unknown plan {plan!r}", hint="dynamic, standard:Q4_K_M, uniform:Q6_K or the path of a plan.json")
        return _given_plan(checkpoint, Plan.read(Path(plan)), use_importance, options)
    stats = _stats_at_hand(checkpoint, options) if use_importance else None
    maker = standard_plan if kind == "standard" else uniform_plan
    return maker(checkpoint, name, stats, stats is not None), stats


def _given_plan(
    checkpoint: Checkpoint, plan: Plan, use_importance: bool, options: Options
) -> tuple[Plan, ActivationStats | None]:
    """A plan that was read or handed over: checked, with its numbers made anew, since it may have been edited."""
    if plan.identity not in ("", checkpoint.identity):
        checkpoint, options = without_outliers(checkpoint, options)
    plan.check(checkpoint)
    plan = replace(plan, use_importance=plan.use_importance and use_importance)
    stats = _stats_at_hand(checkpoint, options) if plan.use_importance else None
    if plan.use_importance and stats is None:
        raise PlanError(
            "the plan wants activation statistics and there are none", hint="give --imatrix or --calibration, or --no-imatrix"
        )
    plan.bpw, plan.file_bytes = bits_per_weight(checkpoint, plan), planned_bytes(checkpoint, plan, stats)
    path = work_directory(checkpoint.path, options.work) / ANALYSIS
    plan.predicted_kld = None
    if path.exists() and plan.use_importance:
        with contextlib.suppress(QuantkitError):  # only the prediction needs it
            sensitivity = Sensitivity.read(path)
            if sensitivity.identity != checkpoint.identity:
                return plan, stats
            plan.predicted_kld = total_prediction(sensitivity, plan, checkpoint)
    return plan, stats


def _stats_at_hand(checkpoint: Checkpoint, options: Options) -> ActivationStats | None:
    """Statistics that the user gave or an earlier analysis left; None where there are none."""
    if options.imatrix is not None:
        return load_stats(options.imatrix, checkpoint)
    if options.calibration:
        return analysis_of(checkpoint, options)[1]
    work = work_directory(checkpoint.path, options.work)
    if not (work / IMATRIX).exists():
        return None
    stats = load_stats(work / IMATRIX, checkpoint)
    attach_moments(stats, work)
    return stats
