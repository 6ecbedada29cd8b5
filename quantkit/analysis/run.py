"""``analyze``: what hurts. Runs calibration, Fisher information, errors and probes; writes the work directory."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from quantkit.analysis.calibration import Calibration, LinearFacts, calibrate
from quantkit.analysis.errors import Decoded, measure_errors
from quantkit.analysis.fisher import Fisher, measure_fisher
from quantkit.analysis.imatrix import load_stats, write_imatrix
from quantkit.analysis.moments import MomentStore, MomentWriter, OutputWriter
from quantkit.analysis.predict import fill_all
from quantkit.analysis.probing import KEPT_WEIGHTS, Prober, probe_groups
from quantkit.analysis.schemes import measure_schemes
from quantkit.analysis.sensitivity import Sensitivity, TensorSensitivity
from quantkit.analysis.superweights import find_super_weights
from quantkit.analysis.texts import DATA, DEFAULT_MIX, CalibrationText, load_calibration
from quantkit.analysis.windows import fisher_windows, scheme_windows
from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.files import write_text
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import CalibrationError
from quantkit.modeling.products import bfloat16_is_fast, fast_float32
from quantkit.progress import Progress

TOKENS = 65536
PROBE_WEIGHTS = 200_000_000  # larger models are not probed: one probe would take too long
ANALYSIS, IMATRIX, PICTURE, MOMENTS = "analysis.json", "imatrix.gguf", "analysis.png", "moments"
EFFORT = 2  # 1: ggml's search only, 2: rounding in the metric of the model's outputs


def work_directory(checkpoint_path: Path, work: Path | None) -> Path:
    """``work``, or ``./NAME.quantkit``: never inside the model's own folder."""
    if work is not None:
        return work
    model = checkpoint_path.resolve()
    model = model.parent if model.suffix == ".safetensors" else model
    return Path(f"{model.name.removesuffix('.gguf')}.quantkit")


@fast_float32()
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
    them. effort: 1 measures ggml's search only, from 2 on ldlq and two_sided too. probes: measure the KL divergence of
    single tensors directly; None: where the model is small enough, and from effort 2 on that of groups where it is not.
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
    known: Decoded | None = {} if checkpoint.n_weights <= KEPT_WEIGHTS else None
    with fast_float32(exact=not large):
        seen, fisher = _passes(checkpoint, text, imatrix, work, key, effort, large and bfloat16_is_fast(), progress)
        tensors = measure_errors(checkpoint, seen.stats, fisher, progress, known)
        for name, fact in seen.facts.items():
            if name in tensors:
                _add_facts(tensors[name], fact)
        sensitivity = Sensitivity(
            model=checkpoint.path.resolve().name,
            architecture=checkpoint.family.arch,
            identity=checkpoint.identity,
            estimator="probes" if probes or (probes is None and not large) else "groups" if probes is None and effort > 1 else "fisher",
            calibration=_described(checkpoint, text, calibration, imatrix, tokens, key),
            tensors=tensors,
            super_weights=find_super_weights(checkpoint, seen.facts),
            schemes=measure_schemes(checkpoint, scheme_windows(text, large), progress),
            coverage=[entry.to_json() for entry in seen.coverage],
        )  # fmt: skip
        _predict(checkpoint, seen.stats, sensitivity, text, known or {}, progress)
    write_text(work / ANALYSIS, sensitivity.to_json())
    from quantkit.analysis.plot import draw_analysis

    draw_analysis(sensitivity, work / PICTURE)
    return sensitivity, seen.stats


def _predict(
    checkpoint: Checkpoint, stats: ActivationStats, sensitivity: Sensitivity, text: CalibrationText, known: Decoded,
    progress: Progress,
) -> None:  # fmt: skip
    """Fill in what the planner goes by, in the way that ``sensitivity.estimator`` says."""
    if sensitivity.estimator == "probes":
        Prober(checkpoint, stats, sensitivity, text, known).run(progress)
    elif sensitivity.estimator == "groups":
        probe_groups(checkpoint, stats, sensitivity, text, progress)
    else:
        fill_all(sensitivity.tensors.values())


def _described(
    checkpoint: Checkpoint, text: CalibrationText, calibration: list[Path] | None, imatrix: Path | None, tokens: int, key: str
) -> dict[str, Any]:
    """What the statistics come from, so that a later run can tell whether it may use them."""
    return {
        "texts": list(text.names), "statistics_tokens": int(text.train.size), "held_apart_tokens": int(text.dev.size),
        "window": text.window, "imatrix": imatrix.name if imatrix else None, "key": key,
        "files": [str(Path(path).resolve()) for path in calibration or []], "tokens": tokens, "stamp": checkpoint.stamp,
        "source": checkpoint.opened.identity,
    }  # fmt: skip


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


def _add_facts(tensor: TensorSensitivity, fact: LinearFacts) -> None:
    tensor.input_peak, tensor.input_rms, tensor.output_peak = fact.input_peak, fact.input_rms, fact.output_peak
    tensor.int8_activation_error, tensor.fp8_activation_error = fact.int8, fact.fp8


def attach_moments(stats: ActivationStats, work: Path) -> None:
    """Let statistics that were read back from ``work`` find the full moments of the same run, if it kept them."""
    stats.moments = MomentStore.open(work / MOMENTS)
