"""``analyze``: what hurts. Runs calibration, Fisher information, errors and probes; writes the work directory."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.analysis.calibration import Calibration, LinearFacts, calibrate
from quantkit.analysis.errors import Decoded, decode_after_encode, measure_errors
from quantkit.analysis.fisher import Fisher, measure_fisher
from quantkit.analysis.imatrix import load_stats, write_imatrix
from quantkit.analysis.moments import MomentStore, MomentWriter, OutputWriter
from quantkit.analysis.predict import balanced_formats, fill_predictions, fit_composition, probe_formats, summed_cost
from quantkit.analysis.schemes import measure_schemes
from quantkit.analysis.sensitivity import Sensitivity, TensorSensitivity
from quantkit.analysis.superweights import find_super_weights
from quantkit.analysis.texts import DATA, DEFAULT_MIX, CalibrationText, load_calibration
from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.files import write_text
from quantkit.encoders.stats import ActivationStats
from quantkit.encoders.threads import map_threads
from quantkit.errors import CalibrationError
from quantkit.formats import get_format
from quantkit.modeling.products import bfloat16_is_fast, fast_float32
from quantkit.progress import Progress

TOKENS = 65536
FISHER_TOKENS = 8192  # behind the rows of the outputs, and at most an eighth of the text: three passes each
MOMENT_TOKENS = 32768  # behind their full moments, and at most half of the text
FEWEST_FISHER_TOKENS = 2048
SCHEME_TOKENS = 2048  # half as many for models that are not probed
PROBE_TOKENS = 4096
REFIT_TOKENS = 12288
KEPT_WEIGHTS = 1 << 24  # decoded tensors of smaller models are kept for the probes: some ten copies in float32
PROBE_WEIGHTS = 200_000_000  # larger models are not probed: one probe would take too long
PROBE_LOGITS = 1 << 28  # probed positions × vocabulary held in memory at most
COMPOSITION_BPW = (2.1, 2.8, 3.5, 4.25, 5.25)
ANALYSIS, IMATRIX, PICTURE, MOMENTS = "analysis.json", "imatrix.gguf", "analysis.png", "moments"
EFFORT = 2  # 1: ggml's search only, 2: rounding in the metric of the model's outputs


def work_directory(checkpoint_path: Path, work: Path | None) -> Path:
    """``work``, or ``./NAME.quantkit``: never inside the model's own folder."""
    if work is not None:
        return work
    model = checkpoint_path.resolve()
    model = model.parent if model.suffix == ".safetensors" else model
    return Path(f"{model.name.removesuffix('.gguf')}.quantkit")


def analyze(
    checkpoint: Checkpoint,
    work: Path,
    *,
    calibration: list[Path] | None = None,
    imatrix: Path | None = None,
    tokens: int = TOKENS,
    probes: bool | None = None,
    effort: int = EFFORT,
    progress: Progress | None = None,
) -> tuple[Sensitivity, ActivationStats]:
    """Measure what quantizing each tensor costs, and write analysis.json, imatrix.gguf and a picture.

    calibration: text files instead of the package's mix. imatrix: statistics to use instead of measuring
    them. effort: 1 measures ggml's search only, from 2 on ldlq and two_sided too. probes: measure the KL divergence of single tensors directly; None decides by the model's size.
    Raises CalibrationError for unusable text or statistics, CheckpointError for a damaged model.
    """
    progress = progress or Progress()
    checkpoint.require_unquantized()
    key = analysis_key(checkpoint, calibration, imatrix, tokens, probes, effort)
    text = load_calibration(checkpoint, calibration, tokens)
    work.mkdir(parents=True, exist_ok=True)
    (work / ANALYSIS).unlink(missing_ok=True)  # an old analysis must not outlive its statistics
    shutil.rmtree(work / MOMENTS, ignore_errors=True)  # and neither must their moments
    large = checkpoint.n_weights > PROBE_WEIGHTS
    if probes is None:
        probes = not large
    known: Decoded | None = {} if checkpoint.n_weights <= KEPT_WEIGHTS else None
    with fast_float32() if large else contextlib.nullcontext():
        seen, fisher = _passes(checkpoint, text, imatrix, work, key, effort, large and bfloat16_is_fast(), progress)
        tensors = measure_errors(checkpoint, seen.stats, fisher, progress, known)
        for name, fact in seen.facts.items():
            if name in tensors:
                _add_facts(tensors[name], fact)
        schemes = measure_schemes(checkpoint, _spread(text.dev, SCHEME_TOKENS // 2 if large else SCHEME_TOKENS), progress)
    sensitivity = Sensitivity(
        model=checkpoint.path.resolve().name,
        architecture=checkpoint.family.arch,
        identity=checkpoint.identity,
        estimator="probes" if probes else "fisher",
        calibration={
            "texts": list(text.names), "statistics_tokens": int(text.train.size), "held_apart_tokens": int(text.dev.size),
            "window": text.window, "imatrix": imatrix.name if imatrix else None, "key": key,
            "files": [str(Path(path).resolve()) for path in calibration or []], "tokens": tokens, "stamp": checkpoint.stamp, "source": checkpoint.opened.identity,
        },
        tensors=tensors,
        super_weights=find_super_weights(checkpoint, seen.facts),
        schemes=schemes,
        coverage=[entry.to_json() for entry in seen.coverage],
    )  # fmt: skip
    if probes:
        _probe(checkpoint, seen.stats, sensitivity, text, progress, {} if known is None else known)
    else:
        for tensor in tensors.values():
            fill_predictions(tensor)
    write_text(work / ANALYSIS, sensitivity.to_json())
    from quantkit.analysis.plot import draw_analysis

    draw_analysis(sensitivity, work / PICTURE)
    return sensitivity, seen.stats


def _passes(
    checkpoint: Checkpoint, text: CalibrationText, imatrix: Path | None, work: Path, key: str, effort: int, half: bool,
    progress: Progress,
) -> tuple[Calibration, Fisher]:  # fmt: skip
    """What text tells: statistics (or those of an imatrix, which knows nothing of peaks and gates) and Fisher information."""
    full = effort > 1 and imatrix is None
    if imatrix is None:
        writer = MomentWriter(work / MOMENTS, checkpoint, key, half) if full else None
        seen = calibrate(checkpoint, text, progress, writer, half)
    else:
        seen = Calibration(load_stats(imatrix, checkpoint))
    write_imatrix(work / IMATRIX, seen.stats)
    windows = fisher_windows(text, full)
    outputs = OutputWriter(work / MOMENTS, checkpoint, windows.size, half) if full else None
    fisher = measure_fisher(checkpoint, windows, progress, full=outputs, half=half)
    attach_moments(seen.stats, work)
    return seen, fisher


def analysis_key(
    checkpoint: Checkpoint, calibration: list[Path] | None, imatrix: Path | None, tokens: int, probes: bool | None,
    effort: int = EFFORT,
) -> str:  # fmt: skip
    """A hash of everything an analysis depends on: it is reused only if this is the same."""
    digest = hashlib.sha256(f"{checkpoint.identity} {checkpoint.stamp} {tokens} {probes} {min(effort, EFFORT)}".encode())
    for path in [*(calibration or [DATA / name for name in DEFAULT_MIX]), *([imatrix] if imatrix else [])]:
        try:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise CalibrationError(f"cannot read {path}: {error.strerror}", hint="check the path") from None
    return digest.hexdigest()[:16]


def _spread(windows: np.ndarray, tokens: int) -> np.ndarray:
    """About ``tokens`` tokens of windows, spread evenly."""
    count = max(1, min(len(windows), tokens // windows.shape[1]))
    return windows[np.unique(np.linspace(0, len(windows) - 1, count).astype(int))]


def fisher_windows(text: CalibrationText, full: bool) -> np.ndarray:
    """Windows behind the Fisher information. full: of whole matrices at the outputs, not only of rows."""
    most = min(MOMENT_TOKENS, text.train.size // 2) if full else min(FISHER_TOKENS, text.train.size // 8)
    return _spread(text.train, max(FEWEST_FISHER_TOKENS, most))


def probe_windows(checkpoint: Checkpoint, text: CalibrationText) -> np.ndarray:
    """Windows that probes are measured on: as many as their logits leave room for."""
    return _spread(text.dev, min(PROBE_TOKENS, max(PROBE_LOGITS // int(checkpoint.config["vocab_size"]), text.window)))


def refit_windows(checkpoint: Checkpoint, text: CalibrationText) -> np.ndarray:
    """Windows that neither the statistics nor the probes saw, int64 (n, window), at most REFIT_TOKENS tokens."""
    probed = {row.tobytes() for row in probe_windows(checkpoint, text)}
    rest = [row for row in text.dev if row.tobytes() not in probed]
    return _spread(np.array(rest), REFIT_TOKENS) if rest else text.dev


def _add_facts(tensor: TensorSensitivity, fact: LinearFacts) -> None:
    tensor.input_peak, tensor.input_rms, tensor.output_peak = fact.input_peak, fact.input_rms, fact.output_peak
    tensor.int8_activation_error, tensor.fp8_activation_error = fact.int8, fact.fp8


def _probe(
    checkpoint: Checkpoint, stats: ActivationStats, sensitivity: Sensitivity, text: CalibrationText, progress: Progress,
    known: Decoded,
) -> None:  # fmt: skip
    """Measure the KL divergence of single tensors on the windows set aside, then of whole plans."""
    from quantkit.analysis.probes import ProbeModel

    model = ProbeModel(checkpoint, probe_windows(checkpoint, text))
    todo = [(name, fmt) for name, t in sensitivity.tensors.items() for fmt in probe_formats(checkpoint.info(name), t.formats)]
    task = progress.task("probe tensors", total=len(todo), unit="probes")
    for name, fmt in todo:
        key = (name, fmt, sensitivity.tensors[name].formats[fmt].method)
        value = known[key] if key in known else decoded(checkpoint, stats, *key)
        sensitivity.tensors[name].formats[fmt].probe_kld = model.divergence({name: value})
        task.advance()
    task.done()
    for tensor in sensitivity.tensors.values():
        fill_predictions(tensor)
    sensitivity.composition = _measure_composition(checkpoint, stats, sensitivity, model, progress, known)


def _measure_composition(
    checkpoint: Checkpoint, stats: ActivationStats, sensitivity: Sensitivity, model: Any, progress: Progress, known: Decoded
) -> tuple[float, float]:
    """How single costs add up: whole plans of several sizes, measured on the same windows."""
    predicted, measured = [], []
    task = progress.task("probe plans", total=len(COMPOSITION_BPW), unit="plans")
    for bpw in COMPOSITION_BPW:
        formats = balanced_formats(sensitivity, bpw)
        values = {}
        for name, fmt in formats.items():
            key = (name, fmt, sensitivity.tensors[name].formats[fmt].method)
            values[name] = known[key] if key in known else decoded(checkpoint, stats, *key)
            if checkpoint.n_weights <= KEPT_WEIGHTS:
                known[key] = values[name]
        predicted.append(summed_cost(sensitivity, formats))
        measured.append(model.divergence(values))
        task.advance()
    task.done()
    return fit_composition(predicted, measured)


def attach_moments(stats: ActivationStats, work: Path) -> None:
    """Let statistics that were read back from ``work`` find the full moments of the same run, if it kept them."""
    stats.moments = MomentStore.open(work / MOMENTS)


def decoded(checkpoint: Checkpoint, stats: ActivationStats, name: str, fmt: str, method: str | None = None) -> np.ndarray:
    """A tensor as it comes back from a format, in its own shape, float32."""
    info = checkpoint.info(name)
    weights = checkpoint.read(name).reshape(info.experts, -1, info.columns)

    def part(expert: int) -> np.ndarray:
        return decode_after_encode(
            weights[expert], stats.importance(name, expert), get_format(fmt), name, method, stats.moments_of(name, expert),
            stats.outputs_of(name, expert, 0, len(weights[expert])),
        )  # fmt: skip

    return np.stack(map_threads(part, range(info.experts))).reshape(info.shape)
