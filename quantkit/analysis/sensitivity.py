"""What each tensor costs in each format: the error the real encoder leaves, and the KL it causes.

``Sensitivity`` is what the planner reads; on disk it is ``analysis.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.fisher import Fisher
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import CalibrationError
from quantkit.formats import Format, formats, get_format
from quantkit.progress import Progress

VERSION = 2
CHUNK_WEIGHTS = 1 << 21  # weights measured at a time
SAMPLE_WEIGHTS = 1 << 23  # larger tensors are measured on a sample of their rows


@dataclass
class FormatCost:
    """One tensor in one format.

    weight_error: ‖ΔW‖²/‖W‖². activation_error: the same of the layer's outputs, E‖ΔWx‖²/E‖Wx‖², with the
    diagonal of E[xxᵀ]. fisher_kld, probe_kld: KL divergence in nats per token by either estimator.
    predicted_kld: what the planner uses.
    """

    weight_error: float
    activation_error: float
    fisher_kld: float
    probe_kld: float | None = None
    predicted_kld: float = 0.0


@dataclass
class TensorSensitivity:
    """Everything the analysis knows about one tensor."""

    role: str
    layer: int | None
    shape: tuple[int, ...]
    kurtosis: float
    outlier_channels: int
    formats: dict[str, FormatCost]
    uncovered_experts: list[int] = field(default_factory=list)
    input_peak: float = 0.0
    input_rms: float = 0.0
    output_peak: float = 0.0
    int8_activation_error: float | None = None
    fp8_activation_error: float | None = None


@dataclass
class Sensitivity:
    """The analysis of one model: read and written as analysis.json."""

    model: str
    architecture: str
    identity: str
    estimator: str
    calibration: dict[str, Any]
    tensors: dict[str, TensorSensitivity]
    super_weights: list[dict[str, Any]] = field(default_factory=list)
    schemes: list[dict[str, Any]] = field(default_factory=list)
    composition: tuple[float, float] = (1.0, 1.0)

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps({"quantkit_analysis": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str, source: str) -> Sensitivity:
        """Parse an analysis.json. Raises CalibrationError naming ``source`` if it is not one."""
        hint = "run `quantkit analyze` again"
        try:
            data = json.loads(text)
            if data.pop("quantkit_analysis") != VERSION:
                raise CalibrationError(f"{source} was written by another version of quantkit", hint=hint)
            tensors = {}
            for name, entry in data.pop("tensors").items():
                formats = {f: FormatCost(**cost) for f, cost in entry.pop("formats").items()}
                entry["shape"] = tuple(entry["shape"])
                tensors[name] = TensorSensitivity(formats=formats, **entry)
            data["composition"] = tuple(data["composition"])
            return Sensitivity(tensors=tensors, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{source} is not an analysis ({error})", hint=hint) from None

    @staticmethod
    def read(path: Path) -> Sensitivity:
        """Read analysis.json. Raises CalibrationError if it is missing or damaged."""
        if not path.exists():
            raise CalibrationError(f"{path} does not exist", hint="run `quantkit analyze` first")
        return Sensitivity.from_json(path.read_text(encoding="utf-8"), str(path))


def offered_formats(info: TensorInfo, stats: ActivationStats | None = None) -> list[type[Format]]:
    """Formats the planner may choose from for a tensor, from few to many bits.

    Formats that ggml writes only with statistics are left out where some expert (or the tensor) has none.
    """
    known = stats is not None and stats.covers(info.name)
    found = [f for f in reversed(formats()) if f.offered and f.fits(info.columns) and (known or not f.needs_importance)]
    return [*found, get_format("BF16" if info.dtype == "BF16" else "F16")]


def decode_after_encode(
    checkpoint_rows: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    fmt: type[Format],
    name: str,
    method: str | None = None,
) -> npt.NDArray[np.float32]:
    """The weights as they come back from the format: float32 (rows, columns)."""
    return fmt.decode(get_encoder(method or default_method(fmt)).encode(checkpoint_rows, importance, fmt, name=name))


def measure_errors(
    checkpoint: Checkpoint, stats: ActivationStats, fisher: Fisher, progress: Progress
) -> dict[str, TensorSensitivity]:
    """Errors of every quantizable tensor in every offered format, with the real encoder."""
    todo = [info for info in checkpoint.tensors.values() if info.quantizable]
    task = progress.task("measure formats", total=sum(info.size for info in todo), unit="weights")
    out = {}
    for info in todo:
        out[info.name] = _measure_tensor(checkpoint, info, stats, fisher)
        task.advance(info.size)
    task.done()
    return out


def _measure_tensor(checkpoint: Checkpoint, info: TensorInfo, stats: ActivationStats, fisher: Fisher) -> TensorSensitivity:
    entry = stats.tensors.get(info.name)
    per_expert = info.rows // info.experts
    stride = max(1, info.size // SAMPLE_WEIGHTS)
    step = max(1, CHUNK_WEIGHTS // info.columns) * stride
    sums = _Sums([fmt.name for fmt in offered_formats(info, stats)], info.columns)
    for expert in range(info.experts):
        importance = stats.importance(info.name, expert)
        share = 1.0
        if entry is not None and info.experts > 1:
            share = float(entry.counts[expert] / max(entry.counts.sum(), 1))
        for start in range(0, per_expert, step):
            rows = np.arange(start, min(start + step, per_expert))[::stride]
            first = expert * per_expert + start
            weight = checkpoint.read_rows(info.name, first, expert * per_expert + int(rows[-1]) + 1)[::stride]
            sums.add(info, weight, importance, share, stride, expert, rows, fisher)
    return TensorSensitivity(
        role=info.role.value,
        layer=info.layer,
        shape=info.shape,
        kurtosis=sums.kurtosis(),
        outlier_channels=sums.outlier_channels(),
        uncovered_experts=entry.uncovered if entry else [],
        formats=sums.costs(),
    )


class _Sums:
    """Adds up the errors of one tensor over its pieces."""

    def __init__(self, formats: list[str], columns: int) -> None:
        self._errors = {name: np.zeros(3) for name in formats}  # weight, activation, Fisher
        self._norms = np.zeros(2)  # of the weights, of the outputs
        self._moments = np.zeros(3)  # count, second, fourth
        self._channels = np.zeros(columns)

    def add(
        self, info: TensorInfo, weight: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None,
        share: float, stride: int, expert: int, rows: npt.NDArray[np.int64], fisher: Fisher,
    ) -> None:  # fmt: skip
        """One piece: float32 (rows, columns) of an expert, whose row numbers are ``rows``."""
        metric = np.ones(info.columns) if importance is None else importance.astype(np.float64)
        squares = weight.astype(np.float64) ** 2
        self._norms += [float(squares.sum()), share * float((squares @ metric).sum())]
        self._moments += [weight.size, float(squares.sum()), float((squares**2).sum())]
        self._channels += squares.sum(0)
        row_weight = fisher.rows[info.name][expert][rows] if info.name in fisher.rows else np.zeros(len(rows))
        for name, total in self._errors.items():
            delta = (decode_after_encode(weight, importance, get_format(name), info.name) - weight).astype(np.float64) ** 2
            in_metric = delta @ metric
            cost = float(row_weight @ in_metric)
            if info.name == "token_embd.weight":
                cost += _lookup_cost(fisher, rows, delta)
            total += [float(delta.sum()), share * float(in_metric.sum()), 0.5 * stride * cost]

    def kurtosis(self) -> float:
        """Fourth moment over the squared second: 3 for normal weights."""
        count, second, fourth = self._moments
        return float(fourth * count / max(second**2, 1e-30))

    def outlier_channels(self) -> int:
        """Input channels whose weights are over six times the median channel's size."""
        rms = np.sqrt(self._channels)
        return int((rms > 6 * np.median(rms)).sum())

    def costs(self) -> dict[str, FormatCost]:
        """Errors relative to the tensor's own size, and Fisher's KL divergence."""
        weights, outputs = np.maximum(self._norms, 1e-30)
        return {name: FormatCost(float(e[0] / weights), float(e[1] / outputs), float(e[2])) for name, e in self._errors.items()}


def _lookup_cost(fisher: Fisher, rows: npt.NDArray[np.int64], delta: npt.NDArray[np.float64]) -> float:
    """Σ of squared gradient × squared error over the embedding rows that text looked up (a tied head comes on top)."""
    known, ours, theirs = np.intersect1d(rows, fisher.embedding_ids, assume_unique=True, return_indices=True)
    return float((delta[ours] * fisher.embedding[theirs]).sum()) if len(known) else 0.0
