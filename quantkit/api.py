"""The five verbs: analyze, plan, quantize, compare, load. The command line calls these and prints.

Each stage reads and writes plain files in the work directory and is skipped if they are there already.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.analysis.imatrix import check_stats, load_stats, read_imatrix
from quantkit.analysis.run import ANALYSIS, EFFORT, IMATRIX, TOKENS, analysis_key, attach_moments, work_directory
from quantkit.analysis.run import analyze as run_analysis
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.checkpoint.files import require_folder, write_text
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import CalibrationError, OutputError, PlanError, QuantkitError
from quantkit.evaluation.compare import Report
from quantkit.planning.artifact import bits_per_weight, planned_bytes
from quantkit.planning.budget import Request, budget_bytes
from quantkit.planning.dynamic import dynamic_plan, total_prediction
from quantkit.planning.memory import Run
from quantkit.planning.plan import Plan
from quantkit.planning.policy import Keep, Policy
from quantkit.planning.standard import ALIASES, BASE, standard_plan, uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer.folder import folder_name
from quantkit.quantizer.folder import run as write_folder
from quantkit.quantizer.folder_plan import folder_format
from quantkit.quantizer.manifest import Manifest
from quantkit.quantizer.pipeline import check_output
from quantkit.quantizer.pipeline import run as run_quantizer

PLAN, TENSORS = "plan.json", "tensors"


@dataclass
class Options:
    """What analyze takes, and quantize too, because it runs analyze where that is missing.

    calibration: text files instead of the package's mix. imatrix: statistics made elsewhere. tokens: how
    much text. probes: measure single tensors directly (None: if the model is small). work: the work
    directory (None: ./NAME.quantkit). effort: 1 uses ggml's search only, 2 error feedback too. pre_tokenizer: llama.cpp's name where it cannot be recognized.
    """

    calibration: Sequence[Path] = ()
    imatrix: Path | None = None
    tokens: int = TOKENS
    probes: bool | None = None
    work: Path | None = None
    effort: int = EFFORT
    pre_tokenizer: str | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.calibration = [Path(path) for path in self.calibration]
        self.imatrix = Path(self.imatrix) if self.imatrix is not None else None
        self.work = Path(self.work) if self.work is not None else None

    @property
    def given(self) -> bool:
        """Whether the user brought statistics or text of their own."""
        return bool(self.calibration) or self.imatrix is not None


def _options(options: Options | None, keywords: dict[str, Any]) -> Options:
    if options is not None and keywords:
        raise TypeError(f"give options or keywords, not both: {', '.join(keywords)}")
    return options or Options(**keywords)


def analyze(model: str | Path, options: Options | None = None, **keywords: Any) -> Sensitivity:
    """Measure what quantizing each tensor of ``model`` costs; reuses an analysis made from the same input.

    Keywords are the fields of :class:`Options`. Raises CheckpointError or CalibrationError.
    """
    options = _options(options, keywords)
    checkpoint = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer)
    checkpoint.require_unquantized()
    return _analysis(checkpoint, options)[0]


def _analysis(checkpoint: Checkpoint, options: Options) -> tuple[Sensitivity, ActivationStats]:
    work = work_directory(checkpoint.path, options.work)
    files = [Path(p) for p in options.calibration] or None
    key = analysis_key(checkpoint, files, options.imatrix, options.tokens, options.probes, options.effort)
    if (work / ANALYSIS).exists() and (work / IMATRIX).exists():
        known = _reusable(work, checkpoint, key, options)
        if known is not None:
            return known
    return run_analysis(
        checkpoint, work, calibration=files, imatrix=options.imatrix, tokens=options.tokens, probes=options.probes,
        effort=options.effort, progress=options.progress,
    )  # fmt: skip


def _reusable(work: Path, checkpoint: Checkpoint, key: str, options: Options) -> tuple[Sensitivity, ActivationStats] | None:
    """The analysis in the work directory if it is of this model, and of this input where one was given."""
    try:
        sensitivity = Sensitivity.read(work / ANALYSIS)
        stats = read_imatrix(work / IMATRIX)
    except QuantkitError:
        return None
    if sensitivity.identity != checkpoint.identity:
        raise CalibrationError(f"{work} holds the analysis of another model ({sensitivity.model})", hint="choose another --work")
    check_stats(stats, checkpoint)
    attach_moments(stats, work)
    if options.effort > 1 and sensitivity.calibration.get("imatrix") is None and stats.moments is None:
        return None  # somebody deleted them
    default = not options.given and options.tokens == TOKENS and options.probes is None and options.effort == EFFORT
    same = default and sensitivity.calibration.get("stamp") == checkpoint.stamp
    return (sensitivity, stats) if same or sensitivity.calibration.get("key") == key else None


def plan(
    model: str | Path, request: Request | None = None, keep: Sequence[str] = (), options: Options | None = None, *,
    only: Sequence[str] = (), **keywords: Any,
) -> Plan:  # fmt: skip
    """The dynamic plan for a budget, written to plan.json in the work directory.

    keep: ``regex=FORMAT``. only: names or patterns (``Q?_K``) of the formats that may be used. Keywords: ``bpw``,
    ``size``, ``fit``, ``like``, ``run`` (see :class:`Request`) and the fields of Options. Raises PlanError with the
    sizes that can be had if the budget is impossible.
    """
    request = request or Request.of(keywords)
    options = _options(options, keywords)
    checkpoint = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer)
    checkpoint.require_unquantized()
    return _dynamic(checkpoint, request, keep, options, only)[0]


def _dynamic(
    checkpoint: Checkpoint, request: Request, keep: Sequence[str], options: Options, only: Sequence[str] = ()
) -> tuple[Plan, ActivationStats]:
    policy = Policy(keeps=[Keep.parse(text) for text in keep], patterns=tuple(only))
    policy.check_used(checkpoint)
    if request.fit is not None or request.size is not None:
        budget_bytes(request, checkpoint, None)  # what is impossible is refused before the analysis
    sensitivity, stats = _analysis(checkpoint, options)
    policy.super_weight_tensors = frozenset(w["tensor"] for w in sensitivity.super_weights)
    policy.tied_heads = frozenset({"token_embd.weight"} if checkpoint.tied else ())
    size, asked = budget_bytes(request, checkpoint, stats)
    made = dynamic_plan(checkpoint, sensitivity, stats, size, policy, budget={**asked, "budget_bytes": size})
    work = work_directory(checkpoint.path, options.work)
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / PLAN, made.to_json())
    return made, stats


def quantize(
    model: str | Path, out: str | Path | None = None, plan: str | Plan = "dynamic", request: Request | None = None, *,
    keep: Sequence[str] = (), only: Sequence[str] = (), use_importance: bool = True, force: bool = False, split_bytes: int | None = None,
    container: str | None = None, options: Options | None = None, **keywords: Any,
) -> tuple[Path, Manifest]:  # fmt: skip
    """Write ``model`` as a quantized GGUF, or as a safetensors folder, and return its path and manifest.

    plan: ``dynamic``, ``standard:Q4_K_M`` (or just ``Q4_K_M``), ``uniform:Q6_K``, a Plan or the path of a
    plan.json; ``uniform:NF4_DQ`` and the like give a folder. container: ``gguf`` or ``safetensors``, for formats
    that both have. Runs what is missing and reuses what is there. Raises a QuantkitError; then nothing is left
    under the final name.
    """
    request = request or Request.of(keywords)
    options = _options(options, keywords)
    checkpoint = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer)
    if (fmt := folder_format(plan, container)) is not None:
        if keep or only or request.given or options.given:
            hint = "leave out --bpw, --size, --fit, --like, --keep, --formats, --imatrix and --calibration"
            raise PlanError(f"--plan {plan} has its own size and rounds without activation statistics", hint=hint)
        target = Path(out or folder_name(checkpoint, fmt))
        return target, write_folder(checkpoint, fmt, target, force=force, shard_bytes=split_bytes, progress=options.progress)
    checkpoint.require_unquantized()
    if out is not None:
        check_output(checkpoint, Path(out), force)
        require_folder(Path(out))
    made, stats = _resolve_plan(checkpoint, plan, request, keep, use_importance, options, only)
    target = Path(out) if out is not None else Path(artifact_name(checkpoint, made))
    cache = work_directory(checkpoint.path, options.work) / TENSORS
    manifest = run_quantizer(
        checkpoint,
        made,
        target,
        stats=stats,
        cache=cache if stats is not None else None,
        force=force,
        split_bytes=split_bytes,
        progress=options.progress,
    )
    return target.with_name(manifest.file), manifest


def _resolve_plan(
    checkpoint: Checkpoint,
    plan: str | Plan,
    request: Request,
    keep: Sequence[str],
    use_importance: bool,
    options: Options,
    only: Sequence[str] = (),
) -> tuple[Plan, ActivationStats | None]:
    if (keep or only or request.given) and plan != "dynamic":
        raise PlanError(
            f"--plan {plan if isinstance(plan, str) else plan.name} has its own size",
            hint="leave out --bpw, --size, --fit, --like, --keep and --formats, or use --plan dynamic",
        )
    if isinstance(plan, Plan):
        return _given_plan(checkpoint, plan, use_importance, options)
    if plan == "dynamic":
        if not use_importance:
            raise PlanError("--no-imatrix goes with standard and uniform plans", hint="a dynamic plan is made from statistics")
        return _dynamic(checkpoint, request, keep, options, only)
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
        return _analysis(checkpoint, options)[1]
    work = work_directory(checkpoint.path, options.work)
    if not (work / IMATRIX).exists():
        return None
    stats = load_stats(work / IMATRIX, checkpoint)
    attach_moments(stats, work)
    return stats


def artifact_name(checkpoint: Checkpoint, plan: Plan) -> str:
    """File name by llama.cpp's convention: model, our plan, then a label that the Hub recognizes."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", checkpoint.path.resolve().name.removesuffix(".gguf"))
    stem = re.sub(r"[-_.](f32|f16|bf16)$", "", stem, flags=re.IGNORECASE)
    middle = "" if plan.name.startswith("standard") else f"-{plan.name}"
    return f"{stem}{middle}-{plan.label}.gguf"


def compare(
    reference: str | Path, candidates: Sequence[str | Path], text: Sequence[str | Path] = (), *, runtime: str = "torch",
    window: int = 512, limit: int | None = None, html: str | Path | None = None, work: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """KL divergence, perplexity and agreement of ``candidates`` against ``reference``; optionally an HTML report.

    Raises CheckpointError if a candidate has another vocabulary, CalibrationError if there is too little text.
    """
    from quantkit.evaluation.compare import compare as run_compare
    from quantkit.evaluation.report import write_html
    from quantkit.evaluation.texts import default_texts

    if html is not None:
        require_folder(Path(html))
        if Path(html).suffix.lower() not in (".html", ".htm"):
            raise OutputError(f"{html} is not a name for a report", hint="end it in .html")
    texts = [Path(t) for t in text] or default_texts()
    report = run_compare(
        Path(reference), [Path(c) for c in candidates], texts, runtime=runtime, window=window, limit=limit, progress=progress
    )
    if html is not None:
        path = work_directory(Path(reference), Path(work) if work else None) / ANALYSIS
        sensitivity = None
        if path.exists():
            with contextlib.suppress(QuantkitError):  # the report only shows it beside its own numbers
                found = Sensitivity.read(path)
                sensitivity = found if found.identity == open_checkpoint(reference).identity else None
        write_html(report, Path(html), sensitivity)
    return report


def load(path: str | Path) -> Any:
    """A model in torch (transformers' class, float32) from a checkpoint, a quantized GGUF or folder, ready to run.

    Raises CheckpointError if the file cannot be read.
    """
    from quantkit.modeling.skeleton import materialized_model

    return materialized_model(open_checkpoint(path))


__all__ = ["Options", "Request", "Run", "analyze", "artifact_name", "compare", "load", "plan", "quantize"]
