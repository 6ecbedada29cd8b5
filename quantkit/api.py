"""The five verbs: analyze, plan, quantize, compare, load. The command line calls these and prints.

Each stage reads and writes plain files in the work directory and is skipped if they are there already.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.analysis.run import ANALYSIS, work_directory
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.checkpoint.files import require_folder, write_text
from quantkit.encoders.ggml import encoding_on
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import CalibrationError, PlanError, QuantkitError
from quantkit.evaluation.checks import check_comparison, require_runtime
from quantkit.evaluation.compare import Report
from quantkit.evaluation.continued import Continued
from quantkit.evaluation.generate import Generation
from quantkit.evaluation.lm_eval.results import EvalReport
from quantkit.kernels.devices import require_device
from quantkit.planning.budget import Request, parse_size
from quantkit.planning.memory import Run
from quantkit.planning.plan import Plan
from quantkit.planning.rules import Rules
from quantkit.planning.speed import SpeedRequest
from quantkit.planning.sweep import STEPS, Sweep, judging_windows, make_sweep, measure_sweep, require_measurable
from quantkit.plans import PLAN, make_dynamic, protect, resolve_plan
from quantkit.progress import Progress
from quantkit.quantizer.folder import folder_name
from quantkit.quantizer.folder import run as write_folder
from quantkit.quantizer.folder_plan import folder_format
from quantkit.quantizer.manifest import Manifest, manifest_path
from quantkit.quantizer.measured import measure
from quantkit.quantizer.pipeline import TENSORS, Packed, check_output
from quantkit.quantizer.pipeline import run as run_quantizer
from quantkit.quantizer.refine import check_refinable, refined
from quantkit.quantizer.repair import Repaired
from quantkit.quantizer.repair import repair as write_repair
from quantkit.quantizer.sequential import sequential
from quantkit.session import FOLDED, Options, analysis_of, text_behind, without_outliers

ADAPTER = "-adapter.gguf"
SEQUENTIAL_EFFORT, REFINE_EFFORT = 3, 4  # from 5 on plans are refitted, see plans.py
EPOCHS = {4: 1.0, 5: 3.0}  # passes over the calibration text that refining takes
SWEEP, SWEEP_PICTURE = "sweep.json", "sweep.png"


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
    return analysis_of(*without_outliers(checkpoint, options))[0]


def plan(
    model: str | Path, request: Request | None = None, keep: Sequence[str] = (), options: Options | None = None, *,
    only: Sequence[str] = (), floors: Sequence[str] = (), speed: SpeedRequest | None = None, **keywords: Any,
) -> Plan:  # fmt: skip
    """The dynamic plan for a budget, written to plan.json in the work directory.

    keep: ``regex=FORMAT``. only: names or patterns (``Q?_K``) of the formats that may be used. speed: tokens per
    second that it must reach (see :class:`SpeedRequest`). Keywords: ``bpw``,
    ``size``, ``fit``, ``like``, ``run`` (see :class:`Request`) and the fields of Options. Raises PlanError with the
    sizes that can be had if the budget is impossible.
    """
    request = request or Request.of(keywords)
    options = _options(options, keywords)
    checkpoint = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer)
    checkpoint.require_unquantized()
    return make_dynamic(checkpoint, request, Rules(keep, only, floors, speed), options)[0]


def sweep(
    model: str | Path, start: float = 2.0, stop: float = 8.0, steps: int = STEPS, *, keep: Sequence[str] = (), only: Sequence[str] = (), floors: Sequence[str] = (),
    speed: SpeedRequest | None = None, measure: bool = False, text: Sequence[str | Path] = (), limit: int | None = None,
    picture: str | Path | None = None, json: str | Path | None = None, options: Options | None = None, **keywords: Any,
) -> Sweep:  # fmt: skip
    """The best plan at ``steps`` sizes from ``start`` to ``stop`` bits per weight, and llama-quantize's mixes beside them.

    measure: fill in the true KL divergence of each, on ``text`` (default: what calibration set aside), at most
    ``limit`` tokens. picture, json: where to write them (default: sweep.png and sweep.json in the work directory).
    Raises PlanError for a range that is none, and for a model that is too large to measure.
    """
    from quantkit.planning.plot import draw_sweep

    options = _options(options, keywords)
    if not 0 < start <= stop <= 32:
        raise PlanError(f"--from {start:g} --to {stop:g} is no range", hint="give two sizes above 0, the smaller one first")
    if (text or limit is not None) and not measure:
        raise PlanError("--text and --limit say what to measure on", hint="add --measure")
    checkpoint = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer)
    checkpoint.require_unquantized()
    work = work_directory(checkpoint.path, options.work)
    drawn, written = Path(picture or work / SWEEP_PICTURE), Path(json or work / SWEEP)
    for path, given in ((drawn, picture), (written, json)):
        if given is not None:
            require_folder(path)
    policy = Rules(keep, only, floors, speed).policy(checkpoint)
    if measure:
        require_measurable(checkpoint)
        windows, names = judging_windows(checkpoint, [Path(t) for t in text], options.files, options.tokens, limit)
    rates = speed.find_rates(options.progress) if speed is not None else None
    checkpoint, options = without_outliers(checkpoint, options)
    sensitivity, stats = analysis_of(checkpoint, options)
    protect(policy, checkpoint, sensitivity)
    least = speed.least if speed is not None else None
    found = make_sweep(checkpoint, sensitivity, stats, policy, start, stop, steps, rates=rates, least_speed=least)
    if measure:
        measure_sweep(found, checkpoint, stats, windows, names, options.progress)
    write_text(written, found.to_json())
    draw_sweep(found, drawn)
    return found


def quantize(
    model: str | Path, out: str | Path | None = None, plan: str | Plan = "dynamic", request: Request | None = None, *,
    keep: Sequence[str] = (), only: Sequence[str] = (), floors: Sequence[str] = (), use_importance: bool = True, force: bool = False, split_bytes: int | None = None,
    container: str | None = None, speed: SpeedRequest | None = None, adapter: str | None = None, device: str = "cpu",
    options: Options | None = None, **keywords: Any,
) -> tuple[Path, Manifest]:  # fmt: skip
    """Write ``model`` as a quantized GGUF, or as a safetensors folder, and return its path and manifest.

    plan: ``dynamic``, ``standard:Q4_K_M`` (or just ``Q4_K_M``), ``uniform:Q6_K``, a Plan or the path of a
    plan.json; ``uniform:NF4_DQ`` and the like give a folder. container: ``gguf`` or ``safetensors``, for formats
    that both have. speed: tokens per second that a dynamic plan must reach. adapter: how much of the size goes to
    a low-rank adapter beside the file (``64MB``, see :func:`repair`). device: where tensors of method ``ggml`` are
    encoded, if it is a GPU. Runs what is missing and reuses what is there.
    Raises a QuantkitError; then nothing is left under the final name.
    """
    request = request or Request.of(keywords)
    options = _options(options, keywords)
    rules = Rules(keep, only, floors, speed, parse_size(adapter) if adapter is not None else 0)
    checkpoint = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer)
    if (fmt := folder_format(plan, container)) is not None:
        if rules.given or request.given or options.given:
            hint = "leave out --bpw, --size, --fit, --like, --keep, --floor, --formats, --min-tokens-per-second, --adapter, --imatrix and --calibration"
            raise PlanError(f"--plan {plan} has its own size and rounds without activation statistics", hint=hint)
        target = Path(out or folder_name(checkpoint, fmt))
        return target, write_folder(checkpoint, fmt, target, force=force, shard_bytes=split_bytes, progress=options.progress)
    checkpoint.require_unquantized()
    require_device(device)
    if out is not None:
        check_output(checkpoint, Path(out), force)
        require_folder(Path(out))
    if rules.adapter_bytes:
        _check_repairable(options)
        if split_bytes is not None:
            raise PlanError("an adapter is made for one file, not for parts", hint="leave out --split-max-size or --adapter")
    made, stats = resolve_plan(checkpoint, plan, request, rules, use_importance, options)
    if made.identity not in ("", checkpoint.identity):
        checkpoint, options = without_outliers(checkpoint, options)
    target = Path(out) if out is not None else Path(artifact_name(checkpoint, made))
    if rules.adapter_bytes:
        check_output(checkpoint, _adapter_of(target), force)
    work = work_directory(checkpoint.path, options.work)
    cache = work / TENSORS
    given, notes = _improved(checkpoint, made, stats, work, options) if plan == "dynamic" else ({}, [])
    with encoding_on(device):
        manifest = run_quantizer(
            checkpoint, made, target, stats=stats, cache=cache if stats is not None else None, force=force,
            split_bytes=split_bytes, given=given, notes=notes, progress=options.progress,
        )  # fmt: skip
    if plan == "dynamic" and stats is not None:
        _record_measured(checkpoint, target.with_name(manifest.file), manifest, options)
    if rules.adapter_bytes:
        assert stats is not None
        found = write_repair(
            checkpoint, open_checkpoint(target), stats, rules.adapter_bytes, _adapter_of(target), options.progress
        )
        manifest.notes.append(found.note)
        write_text(manifest_path(target), manifest.to_json())
    return target.with_name(manifest.file), manifest


def _record_measured(checkpoint: Checkpoint, path: Path, manifest: Manifest, options: Options) -> None:
    """Measure a finished file and write that beside its prediction into the manifest."""
    work = work_directory(checkpoint.path, options.work)
    try:
        text = text_behind(checkpoint, options, Sensitivity.read(work / ANALYSIS).calibration)
    except CalibrationError as error:
        manifest.notes.append(f"the file was not measured: {error}")
    else:
        manifest.plan["measured_kld"] = asdict(measure(checkpoint, path, text, options.progress))
    write_text(manifest_path(path), manifest.to_json())


def _adapter_of(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.gguf')}{ADAPTER}")


def _check_repairable(options: Options) -> None:
    """Raise PlanError where an adapter cannot be made, or would undo what was done on purpose."""
    if options.effort >= SEQUENTIAL_EFFORT:
        why = "tensors encoded one after the other are off on purpose, an adapter would undo that"
        raise PlanError(f"--adapter does not go with --effort {options.effort}: {why}", hint="use --effort 2")
    if options.effort < 2 or options.imatrix is not None:
        raise PlanError("an adapter needs full second moments", hint="use --effort 2 without --imatrix")


def repair(
    model: str | Path, quantized: str | Path, size: str, out: str | Path | None = None, *, force: bool = False,
    options: Options | None = None, **keywords: Any,
) -> Repaired:  # fmt: skip
    """Write a low-rank adapter of at most ``size`` (``64MB``) for a quantized GGUF of ``model``, anybody's.

    llama.cpp adds it with ``--lora``, :func:`compare` as FILE+ADAPTER. Keywords are the fields of Options. Raises
    PlanError if the two are not the same model or the size is too small.
    """
    options = _options(options, keywords)
    _check_repairable(options)
    checkpoint, file = open_checkpoint(model, pre_tokenizer=options.pre_tokenizer), open_checkpoint(quantized)
    checkpoint.require_unquantized()
    path = Path(out) if out is not None else _adapter_of(file.path)
    check_output(checkpoint, path, force)
    require_folder(path)
    view, inside = without_outliers(checkpoint, options)
    if view is not checkpoint and _apart(view, file) < _apart(checkpoint, file):
        checkpoint, options = view, inside
    stats = analysis_of(checkpoint, options)[1]
    return write_repair(checkpoint, file, stats, parse_size(size), path, options.progress)


def _apart(checkpoint: Checkpoint, other: Checkpoint) -> float:
    """How far the vectors of two models are apart: those of a rescaled model are others."""
    both = [info for info in checkpoint.tensors.values() if len(info.shape) == 1 and info.name in other.tensors]
    return sum(float(np.abs(checkpoint.read(info.name) - other.read(info.name)).sum()) for info in both)


def _improved(
    checkpoint: Checkpoint, plan: Plan, stats: ActivationStats | None, work: Path, options: Options
) -> tuple[Mapping[str, Packed], list[str]]:
    """Bytes that the whole model had a say in, and what to tell about them; nothing below effort 3."""
    if options.effort < SEQUENTIAL_EFFORT or stats is None or options.imatrix is not None:
        return {}, []
    if options.effort >= REFINE_EFFORT:
        check_refinable(checkpoint)
    text = text_behind(checkpoint, options, Sensitivity.read(work / ANALYSIS).calibration)
    followed = sequential(checkpoint, plan, stats, text, work, options.progress)
    given, notes = followed.given, [followed.note]
    if options.effort >= REFINE_EFFORT:
        found = refined(checkpoint, plan, stats, text, work, EPOCHS[options.effort], options.progress, given)
        given, notes = {**given, **found.packed}, [*notes, found.note]
    return given, notes


def artifact_name(checkpoint: Checkpoint, plan: Plan) -> str:
    """File name by llama.cpp's convention: model, our plan, then a label that the Hub recognizes."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", checkpoint.path.resolve().name.removesuffix(".gguf"))
    stem = re.sub(r"[-_.](f32|f16|bf16)$", "", stem, flags=re.IGNORECASE)
    middle = "" if plan.name.startswith("standard") else f"-{plan.name}"
    return f"{stem}{middle}-{plan.label}.gguf"


def compare(
    reference: str | Path, candidates: Sequence[str | Path], text: Sequence[str | Path] = (), *, runtime: str = "torch",
    window: int = 512, limit: int | None = None, html: str | Path | None = None, work: str | Path | None = None,
    device: str = "cpu", cache: str | Path | None = None, append: str | Path | None = None, speed: bool = False,
    texts: Sequence[Continued] = (), results: EvalReport | None = None, sweep: Sweep | None = None, command: str = "",
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """KL divergence, perplexity and agreement of ``candidates`` against ``reference``; optionally an HTML report.

    cache: file of the reference's distributions, written if it is not there, else read instead of running the reference; it may
    also stand for the reference itself, as may a file of llama-perplexity's ``--kl-divergence-base``. append: a leaderboard that
    takes the rows. speed: also run each model alone (:mod:`quantkit.evaluation.footprint`). The rest is shown in the report:
    texts (:mod:`quantkit.evaluation.continued`), results of tasks, a sweep of the same model, the command that made it.

    Raises CheckpointError if a candidate has another vocabulary, CalibrationError if there is too little text, PlanError if
    results or sweep are of another model.
    """
    from quantkit.evaluation.board import append as append_board
    from quantkit.evaluation.board import render, rows_of
    from quantkit.evaluation.candidates import split_adapter
    from quantkit.evaluation.compare import compare as run_compare
    from quantkit.evaluation.compare import is_kept
    from quantkit.evaluation.footprint import footprints
    from quantkit.evaluation.report.page import Extras, plan_reasons, require_same_models, samples_of, write_html
    from quantkit.evaluation.texts import default_texts
    from quantkit.planning.rates import machine_name

    check_comparison(reference, candidates, text, runtime, device, limit, html, cache, append)
    original, files = Path(reference), [Path(c) for c in candidates]
    require_same_models(original, files, results, sweep)
    report = run_compare(
        original, files, [Path(t) for t in text] or default_texts(), runtime=runtime, window=window, limit=limit, device=device,
        cache=Path(cache) if cache else None, progress=progress,
    )  # fmt: skip
    if speed:
        kept = is_kept(original)
        found = footprints(files if kept else [original, *files], runtime, device, progress)
        report.reference_footprint = None if kept else found.pop(0)
        for candidate, footprint in zip(report.candidates, found, strict=True):
            candidate.footprint = footprint
    board = append_board(Path(append), rows_of(report)) if append is not None else None
    if html is not None:
        extras = Extras(
            reasons=[plan_reasons(split_adapter(path)[0]) for path in files], sweep=sweep, results=results, samples=samples_of(texts),
            board=render(board, like=report, origin=True) if board is not None else (), hardware=machine_name(), command=command,
        )  # fmt: skip
        write_html(report, Path(html), _analysis_beside(original, Path(work) if work else None), extras)
    return report


def _analysis_beside(reference: Path, work: Path | None) -> Sensitivity | None:
    """The analysis of a model that its work directory holds; a report only shows it beside its own numbers."""
    folder, sensitivity = work_directory(reference, work), None
    for path in (folder / FOLDED / ANALYSIS, folder / ANALYSIS):
        with contextlib.suppress(QuantkitError):
            found = Sensitivity.read(path)
            if found.calibration.get("source") == open_checkpoint(reference).identity:
                sensitivity = found
    return sensitivity


def load(path: str | Path, dtype: Any = None, device: Any = "cpu") -> Any:
    """A model in torch (transformers' class) from a checkpoint, a quantized GGUF or folder, ready to run and to generate.

    The quantized tensors of a GGUF stay packed. dtype: of everything else (float32 by default); device: ``cuda``, say.
    Raises CheckpointError if the file cannot be read.
    """
    from quantkit.modeling.packed import packed_model

    return packed_model(open_checkpoint(path), dtype, device)


def generate(
    model: str | Path, prompt: str, count: int = 128, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    seed: int = 0, runtime: str = "torch", device: str = "cpu", chat: bool = False, compiled: bool = False,
    show: Callable[[str], None] | None = None,
) -> Generation:  # fmt: skip
    """At most ``count`` tokens of text after ``prompt``; see :func:`quantkit.evaluation.generate.generate`.

    temperature 0 takes the most likely token. runtime: ``torch`` or ``llama``. chat: in the model's chat template.
    compiled: as ``quantkit tune --compile`` found best. show: is called with each new piece of text. Raises a QuantkitError.
    """
    from quantkit.evaluation.generate import Sampling
    from quantkit.evaluation.generate import generate as run

    require_runtime(runtime, device, compiled)
    sampling = Sampling(temperature, top_k, top_p, seed)
    return run(
        open_checkpoint(model), prompt, count, sampling, runtime=runtime, device=device, chat=chat, compiled=compiled, show=show
    )


__all__ = [
    "PLAN",
    "Options",
    "Request",
    "Run",
    "SpeedRequest",
    "analyze",
    "artifact_name",
    "compare",
    "generate",
    "load",
    "plan",
    "quantize",
    "repair",
    "sweep",
]
