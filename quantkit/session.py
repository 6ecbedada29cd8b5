"""What the verbs have in common: options, and the analysis and rescaling that the work directory may hold already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.imatrix import check_stats, read_imatrix
from quantkit.analysis.run import ANALYSIS, EFFORT, IMATRIX, TOKENS, analysis_key, attach_moments, work_directory
from quantkit.analysis.run import analyze as run_analysis
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.analysis.texts import CalibrationText, load_calibration
from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.transformed import Transform, TransformedCheckpoint
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.progress import Progress
from quantkit.quantizer.fold import find_fold

FOLDED = "folded"  # folder in the work directory for everything about the rescaled weights
FOLD_TOKENS = 8192  # of calibration text behind the search for a rescaling


@dataclass
class Options:
    """What analyze takes, and quantize too, because it runs analyze where that is missing.

    calibration: text files instead of the package's mix. imatrix: statistics made elsewhere. tokens: how
    much text. probes: measure single tensors directly (None: if the model is small). work: the work
    directory (None: ./NAME.quantkit). effort: 1 uses ggml's search only; 2 rounds in
    the metric of the model's outputs; 3 encodes tensors one after the other; 4 relearns scales and norms after
    that; 5 measures plans and corrects them before, and learns three times as long. pre_tokenizer: llama.cpp's name where it cannot be recognized.
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

    @property
    def files(self) -> list[Path] | None:
        """Calibration texts of the user's own, None for the package's mix."""
        return [Path(path) for path in self.calibration] or None


def analysis_of(checkpoint: Checkpoint, options: Options) -> tuple[Sensitivity, ActivationStats]:
    """The analysis and statistics in the work directory if they are of this input, else made anew."""
    work = work_directory(checkpoint.path, options.work)
    key = analysis_key(checkpoint, options.files, options.imatrix, options.tokens, options.probes, options.effort)
    if (work / ANALYSIS).exists() and (work / IMATRIX).exists():
        known = _reusable(work, checkpoint, key, options)
        if known is not None:
            return known
    return run_analysis(
        checkpoint, work, calibration=options.files, imatrix=options.imatrix, tokens=options.tokens, probes=options.probes,
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
    default = not options.given and options.tokens == TOKENS and options.probes is None and options.effort >= EFFORT
    same = default and sensitivity.calibration.get("stamp") == checkpoint.stamp
    return (sensitivity, stats) if same or sensitivity.calibration.get("key") == key else None


def text_behind(checkpoint: Checkpoint, options: Options, calibration: dict[str, Any]) -> CalibrationText:
    """The text that an analysis was made from, as token windows: what was given, or what the analysis says.

    Raises CalibrationError if a file of the user's is no longer where it was.
    """
    files = options.files or ([Path(path) for path in calibration["files"]] or None)
    return load_calibration(checkpoint, files, calibration["tokens"])


def without_outliers(checkpoint: Checkpoint, options: Options) -> tuple[Checkpoint, Options]:
    """The model with its outlier channels moved where they do not hurt, and a work directory for it; both unchanged if it has none.

    The rescaling is exact and found once for a model and its calibration text.
    """
    if options.effort < EFFORT or options.imatrix is not None:
        return checkpoint, options
    work = work_directory(checkpoint.path, options.work)
    key = analysis_key(checkpoint, options.files, None, FOLD_TOKENS, None, EFFORT)
    path = work / FOLDED / f"transform-{key}.safetensors"
    transform = None
    if not options.given and not path.exists():  # as with an analysis: what is there is used, whatever text it is from
        path = max(path.parent.glob("transform-*.safetensors"), key=lambda p: p.stat().st_mtime, default=path)
    if path.exists():
        try:
            transform = Transform.load(path)
        except QuantkitError:
            path.unlink()
    if transform is not None and transform.identity != checkpoint.identity:
        transform = None
    if transform is None:
        text = load_calibration(checkpoint, options.files, FOLD_TOKENS)
        transform = find_fold(checkpoint, calibrate(checkpoint, text, options.progress).stats, options.progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        transform.save(path)
    if not transform.tensors:
        return checkpoint, options
    return TransformedCheckpoint(checkpoint, transform), replace(options, work=work / FOLDED)
