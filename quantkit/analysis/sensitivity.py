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
from quantkit.encoders import get_encoder
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import CalibrationError
from quantkit.formats import Format, get_format
from quantkit.progress import Progress

VERSION = 1
OFFERED = ("Q2_K", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
OFFERED_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
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


def offered_formats(info: TensorInfo) -> list[type[Format]]:
    """Formats the planner may choose from for a tensor, from few to many bits."""
    names = OFFERED if info.columns % 256 == 0 else OFFERED_32
    found = [get_format(name) for name in names if get_format(name).fits(info.columns)]
    found.append(get_format("BF16" if info.dtype == "BF16" else "F16"))
    return found


def decode_after_encode(
    checkpoint_rows: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    fmt: type[Format],
    name: str,
    method: str = "ggml",
) -> npt.NDArray[np.float32]:
    """The weights as they come back from the format: float32 (rows, columns)."""
    return fmt.decode(get_encoder(method).encode(checkpoint_rows, importance, fmt, name=name))


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
    sums: dict[str, np.ndarray] = {f.name: np.zeros(3) for f in offered_formats(info)}
    norms = np.zeros(2)
    moments = np.zeros(3)
    channels = np.zeros(info.columns)
    for expert in range(info.experts):
        start = expert * per_expert
        weight = checkpoint.read_rows(info.name, start, start + per_expert)[::stride]
        importance = stats.importance(info.name, expert)
        metric = np.ones(info.columns) if importance is None else importance.astype(np.float64)
        share = 1.0 if entry is None or info.experts == 1 else float(entry.counts[expert] / max(entry.counts.sum(), 1))
        rows = _row_fisher(fisher, info, expert, metric)[::stride]
        norms += [float((weight.astype(np.float64) ** 2).sum()), share * float((weight.astype(np.float64) ** 2 @ metric).sum())]
        moments += [weight.size, float((weight.astype(np.float64) ** 2).sum()), float((weight.astype(np.float64) ** 4).sum())]
        channels += (weight.astype(np.float64) ** 2).sum(0)
        for fmt in offered_formats(info):
            delta = (decode_after_encode(weight, importance, fmt, info.name) - weight).astype(np.float64) ** 2
            cost = 0.5 * stride * float((rows * delta).sum()) if rows.ndim == 2 else 0.5 * stride * float(rows @ (delta @ metric))
            sums[fmt.name] += [float(delta.sum()), share * float((delta @ metric).sum()), cost]
    rms = np.sqrt(channels)
    return TensorSensitivity(
        role=info.role.value,
        layer=info.layer,
        shape=info.shape,
        kurtosis=float(moments[2] * moments[0] / max(moments[1] ** 2, 1e-30)),
        outlier_channels=int((rms > 6 * np.median(rms)).sum()),
        uncovered_experts=entry.uncovered if entry else [],
        formats={f: FormatCost(s[0] / max(norms[0], 1e-30), s[1] / max(norms[1], 1e-30), float(s[2])) for f, s in sums.items()},
    )


def _row_fisher(fisher: Fisher, info: TensorInfo, expert: int, metric: np.ndarray) -> np.ndarray:
    """Weight of each row's output error (rows,), or of each weight (rows, columns) for the embedding.

    A tied embedding is weighed twice: as a lookup table and as the head.
    """
    rows = fisher.rows.get(info.name)
    if info.name != "token_embd.weight":
        return rows[expert] if rows is not None else np.zeros(info.rows // info.experts)
    assert fisher.embedding is not None
    weights = fisher.embedding.copy()
    if rows is not None:
        weights += rows[0][:, None] * metric[None, :]
    return weights
