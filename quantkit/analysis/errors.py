"""What each format really costs a tensor: its weights through the real encoders, and the error they leave."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.analysis.fisher import Fisher
from quantkit.analysis.sensitivity import FormatCost, TensorSensitivity
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.ldlq import LdlqEncoder
from quantkit.encoders.stats import ActivationStats, Moments
from quantkit.formats import Format, formats, get_format
from quantkit.progress import Progress

CHUNK_WEIGHTS = 1 << 21  # weights measured at a time
SAMPLE_WEIGHTS = 1 << 23  # larger tensors are measured on a sample of their rows
SAMPLE_PRODUCTS = 1 << 33  # and on fewer rows yet where the metric is a full matrix: weights × columns

Matrix = npt.NDArray[np.float32]


def offered_formats(info: TensorInfo, stats: ActivationStats | None = None) -> list[type[Format]]:
    """Formats the planner may choose from for a tensor, from few to many bits.

    Formats that ggml writes only with statistics are left out where some expert (or the tensor) has none.
    """
    known = stats is not None and stats.covers(info.name)
    found = [f for f in reversed(formats()) if f.offered and f.fits(info.columns) and (known or not f.needs_importance)]
    return [*found, get_format("BF16" if info.dtype == "BF16" else "F16")]


def decode_after_encode(
    weight: Matrix,
    importance: Matrix | None,
    fmt: type[Format],
    name: str,
    method: str | None = None,
    moments: Moments | None = None,
) -> Matrix:
    """The weights as they come back from the format: float32 (rows, columns)."""
    encoder = get_encoder(method or default_method(fmt))
    return fmt.decode(encoder.encode(weight, importance, fmt, moments=moments, name=name))


def both_ways(
    weight: Matrix, importance: Matrix | None, fmt: type[Format], name: str, moments: Moments | None
) -> dict[str, Matrix]:
    """method → the weights as they come back: ggml's search, and error feedback on its scales where moments exist."""
    method = default_method(fmt)
    packed = get_encoder(method).encode(weight, importance, fmt, name=name)
    out = {method: fmt.decode(packed)}
    ldlq = get_encoder("ldlq")
    assert isinstance(ldlq, LdlqEncoder)
    if moments is not None and ldlq.writes(fmt):
        out["ldlq"] = fmt.decode(ldlq.refine(weight, packed, fmt, moments, name=name))
    return out


class Metric:
    """How an error in a matrix shows in its outputs: the second moments of its inputs, full or diagonal."""

    def __init__(self, columns: int, importance: Matrix | None, moments: Moments | None) -> None:
        self._diagonal = np.ones(columns, np.float32) if importance is None else importance
        self._blocks = None if moments is None else [np.asarray(block, np.float32) for block in moments.read()]

    def of_rows(self, delta: Matrix) -> npt.NDArray[np.float64]:
        """E (δ·x)² for each row δ of a matrix (rows, columns): float64 (rows,)."""
        if self._blocks is None:
            return (delta.astype(np.float64) ** 2) @ self._diagonal.astype(np.float64)
        total, start = np.zeros(len(delta)), 0
        for block in self._blocks:
            part = np.ascontiguousarray(delta[:, start : start + len(block)])
            total += np.einsum("ij,ij->i", part @ block, part, dtype=np.float64)
            start += len(block)
        return np.maximum(total, 0)


def measure_errors(
    checkpoint: Checkpoint, stats: ActivationStats, fisher: Fisher, progress: Progress
) -> dict[str, TensorSensitivity]:
    """Errors of every quantizable tensor in every offered format, with the real encoders."""
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
    sample = SAMPLE_WEIGHTS if stats.moments is None else min(SAMPLE_WEIGHTS, SAMPLE_PRODUCTS // info.columns)
    stride = max(1, info.size // sample)
    step = max(1, CHUNK_WEIGHTS // info.columns) * stride
    sums = _Sums(info, offered_formats(info, stats), fisher, stride)
    for expert in range(info.experts):
        importance, moments = stats.importance(info.name, expert), stats.moments_of(info.name, expert)
        share = 1.0
        if entry is not None and info.experts > 1:
            share = float(entry.counts[expert] / max(entry.counts.sum(), 1))
        for start in range(0, per_expert, step):
            rows = np.arange(start, min(start + step, per_expert))[::stride]
            first = expert * per_expert + start
            weight = checkpoint.read_rows(info.name, first, expert * per_expert + int(rows[-1]) + 1)[::stride]
            sums.add(weight, importance, moments, share, expert, rows)
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
    """Adds up the errors of one tensor over its pieces, for every format and method."""

    def __init__(self, info: TensorInfo, offered: list[type[Format]], fisher: Fisher, stride: int) -> None:
        self._info, self._offered, self._fisher, self._stride = info, offered, fisher, stride
        self._errors: dict[tuple[str, str], npt.NDArray[np.float64]] = {}  # weight, activation, Fisher
        self._norms = np.zeros(2)  # of the weights, of the outputs
        self._moments = np.zeros(3)  # count, second, fourth
        self._channels = np.zeros(info.columns)

    def add(
        self, weight: Matrix, importance: Matrix | None, moments: Moments | None, share: float, expert: int,
        rows: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        """One piece: float32 (rows, columns) of an expert, whose row numbers are ``rows``."""
        name, fisher = self._info.name, self._fisher
        metric = Metric(self._info.columns, importance, moments)
        squares = weight.astype(np.float64) ** 2
        self._norms += [float(squares.sum()), share * float(metric.of_rows(weight).sum())]
        self._moments += [weight.size, float(squares.sum()), float((squares**2).sum())]
        self._channels += squares.sum(0)
        row_weight = fisher.rows[name][expert][rows] if name in fisher.rows else np.zeros(len(rows))
        for fmt in self._offered:
            for method, back in both_ways(weight, importance, fmt, name, moments).items():
                delta = back - weight
                in_metric = metric.of_rows(delta)
                cost = float(row_weight @ in_metric)
                if name == "token_embd.weight":
                    cost += _lookup_cost(fisher, rows, delta)
                total = self._errors.setdefault((fmt.name, method), np.zeros(3))
                total += [
                    float(np.square(delta, dtype=np.float64).sum()),
                    share * float(in_metric.sum()),
                    0.5 * self._stride * cost,
                ]

    def kurtosis(self) -> float:
        """Fourth moment over the squared second: 3 for normal weights."""
        count, second, fourth = self._moments
        return float(fourth * count / max(second**2, 1e-30))

    def outlier_channels(self) -> int:
        """Input channels whose weights are over six times the median channel's size."""
        rms = np.sqrt(self._channels)
        return int((rms > 6 * np.median(rms)).sum())

    def costs(self) -> dict[str, FormatCost]:
        """Errors relative to the tensor's own size, and Fisher's KL divergence, by the method that leaves the least."""
        weights, outputs = np.maximum(self._norms, 1e-30)
        out: dict[str, FormatCost] = {}
        for (name, method), e in self._errors.items():
            cost = FormatCost(float(e[0] / weights), float(e[1] / outputs), float(e[2]), method=method)
            best = out.get(name)
            if best is None or (cost.fisher_kld or cost.activation_error) < (best.fisher_kld or best.activation_error):
                out[name] = cost
        return out


def _lookup_cost(fisher: Fisher, rows: npt.NDArray[np.int64], delta: Matrix) -> float:
    """Σ of squared gradient × squared error over the embedding rows that text looked up (a tied head comes on top)."""
    known, ours, theirs = np.intersect1d(rows, fisher.embedding_ids, assume_unique=True, return_indices=True)
    return float((delta[ours].astype(np.float64) ** 2 * fisher.embedding[theirs]).sum()) if len(known) else 0.0
