"""What each format really costs a tensor: its weights through the real encoders, and the error they leave."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from quantkit.analysis.fisher import Fisher
from quantkit.analysis.predict import error_of, probe_formats
from quantkit.analysis.sensitivity import FormatCost, TensorSensitivity
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.base import map_threads
from quantkit.encoders.ldlq import LdlqEncoder
from quantkit.encoders.stats import ActivationStats, Moments
from quantkit.formats import Format, formats, get_format
from quantkit.progress import Progress

CHUNK_WEIGHTS = 1 << 21  # weights measured at a time
SAMPLE_WEIGHTS = 1 << 23  # larger tensors are measured on a sample of their rows
SAMPLE_PRODUCTS = 1 << 33  # and on fewer rows yet where the metric is a full matrix: weights × columns

Matrix = npt.NDArray[np.float32]
Decoded = dict[tuple[str, str, str], Matrix]  # by tensor, format and method


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
    outputs: Moments | None = None,
) -> Matrix:
    """The weights as they come back from the format: float32 (rows, columns)."""
    encoder = get_encoder(method or default_method(fmt))
    return fmt.decode(encoder.encode(weight, importance, fmt, moments=moments, outputs=outputs, name=name))


def ways(
    weight: Matrix, importance: Matrix | None, fmt: type[Format], name: str, moments: Moments | None, outputs: Moments | None = None,
    two_sided: bool = False,
) -> dict[str, Matrix]:  # fmt: skip
    """method → the weights as they come back: ggml's search, and what refines it where moments exist."""
    method = default_method(fmt)
    packed = get_encoder(method).encode(weight, importance, fmt, name=name)
    out = {method: fmt.decode(packed)}
    for refining in ("ldlq", "two_sided") if two_sided else ("ldlq",):
        encoder = get_encoder(refining)
        assert isinstance(encoder, LdlqEncoder)
        if moments is not None and encoder.writes(fmt):
            out[refining] = fmt.decode(encoder.refine(weight, packed, fmt, moments, outputs=outputs, name=name))
    return out


class Metric:
    """How an error in a matrix shows: in its outputs by the second moments of its inputs, full or diagonal, and in the
    model's distribution by those of the gradients at its outputs."""

    def __init__(self, columns: int, importance: Matrix | None, moments: Moments | None, outputs: Moments | None = None) -> None:
        self._diagonal = np.ones(columns, np.float32) if importance is None else importance
        self._blocks = None if moments is None else [np.asarray(block, np.float32) for block in moments.read()]
        self._outputs = None if outputs is None else [np.asarray(block, np.float32) for block in outputs.read()]

    def of_rows(self, delta: Matrix, row_weight: npt.NDArray[np.float64]) -> tuple[float, float]:
        """(E ‖Δx‖², E (g·Δx)²) of an error (rows, columns). row_weight: float64 (rows,), E g² where there is no more."""
        image = self._image(delta)
        by_row = np.maximum(np.einsum("ij,ij->i", image, delta, dtype=np.float64), 0)
        if self._outputs is None:
            return float(by_row.sum()), float(row_weight @ by_row)
        total, start = 0.0, 0
        for block in self._outputs:
            rows = slice(start, start + len(block))
            total += float(np.einsum("ij,ij->", block @ image[rows], delta[rows], dtype=np.float64))
            start += len(block)
        return float(by_row.sum()), max(total, 0.0)

    def _image(self, delta: Matrix) -> Matrix:
        """Δ E[x xᵀ]."""
        if self._blocks is None:
            return delta * self._diagonal
        parts, start = [], 0
        for block in self._blocks:
            parts.append(np.ascontiguousarray(delta[:, start : start + len(block)]) @ block)
            start += len(block)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def measure_errors(
    checkpoint: Checkpoint, stats: ActivationStats, fisher: Fisher, progress: Progress, decoded: Decoded | None = None
) -> dict[str, TensorSensitivity]:
    """Errors of every quantizable tensor in every offered format, with the real encoders.

    decoded: is filled with what two_sided made of whole tensors, so that probes need not encode them again.
    """
    todo = [info for info in checkpoint.tensors.values() if info.quantizable]
    task = progress.task("measure formats", total=sum(info.size for info in todo), unit="weights")
    out = {}
    for info in todo:
        out[info.name] = _measure_tensor(checkpoint, info, stats, fisher, decoded)
        task.advance(info.size)
    task.done()
    return out


def _measure_tensor(
    checkpoint: Checkpoint, info: TensorInfo, stats: ActivationStats, fisher: Fisher, decoded: Decoded | None
) -> TensorSensitivity:
    entry = stats.tensors.get(info.name)
    sums = _Sums(info, offered_formats(info, stats), fisher, keep=decoded is not None)
    for expert in range(info.experts):
        share = 1.0
        if entry is not None and info.experts > 1:
            share = float(entry.shares[expert])
        for rows in _sampled_rows(info, stats):
            first = expert * (info.rows // info.experts) + int(rows[0])
            stride = int(rows[1] - rows[0]) if len(rows) > 1 else 1
            weight = checkpoint.read_rows(info.name, first, first + int(rows[-1] - rows[0]) + 1)[::stride]
            sums.add(weight, stats, share, expert, rows)
    if decoded is not None:
        for name, pieces in sums.kept.items():
            if sum(map(len, pieces)) == info.rows:
                decoded[info.name, name, "two_sided"] = np.concatenate(pieces).reshape(info.shape)
    return TensorSensitivity(
        role=info.role.value,
        layer=info.layer,
        shape=info.shape,
        kurtosis=sums.kurtosis(),
        outlier_channels=sums.outlier_channels(),
        uncovered_experts=entry.uncovered if entry else [],
        formats=sums.costs(),
    )


def _sampled_rows(info: TensorInfo, stats: ActivationStats) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers within an expert, a piece at a time; whole blocks where outputs tie rows together."""
    rows, together = info.rows // info.experts, stats.output_rows(info.name)
    sample = SAMPLE_WEIGHTS if stats.moments is None else min(SAMPLE_WEIGHTS, SAMPLE_PRODUCTS // info.columns)
    stride = max(1, info.size // sample)
    if together:
        yield from (np.arange(start, start + together) for start in range(0, rows, together * stride))
        return
    step = max(1, CHUNK_WEIGHTS // info.columns) * stride
    yield from (np.arange(start, min(start + step, rows))[::stride] for start in range(0, rows, step))


class _Sums:
    """Adds up the errors of one tensor over its pieces, for every format and method."""

    def __init__(self, info: TensorInfo, offered: list[type[Format]], fisher: Fisher, keep: bool = False) -> None:
        self._info, self._offered, self._fisher, self._keep = info, offered, fisher, keep
        self._probed = set(probe_formats(info, [fmt.name for fmt in offered]))
        self._errors: dict[tuple[str, str], npt.NDArray[np.float64]] = {}  # weight, activation, Fisher
        self.kept: dict[str, list[Matrix]] = {}  # what two_sided gave back, by format
        self._norms = np.zeros(2)  # of the weights, of the outputs
        self._moments = np.zeros(3)  # count, second, fourth
        self._channels = np.zeros(info.columns)

    def add(self, weight: Matrix, stats: ActivationStats, share: float, expert: int, rows: npt.NDArray[np.int64]) -> None:
        """One piece: float32 (rows, columns) of an expert, whose row numbers are ``rows``."""
        name, fisher = self._info.name, self._fisher
        importance, moments = stats.importance(name, expert), stats.moments_of(name, expert)
        outputs = stats.outputs_of(name, expert, int(rows[0]), int(rows[-1]) + 1) if stats.output_rows(name) else None
        metric = Metric(self._info.columns, importance, moments, outputs)
        row_weight = fisher.rows[name][expert][rows] if name in fisher.rows else np.zeros(len(rows))
        squares = weight.astype(np.float64) ** 2
        self._norms += [float(squares.sum()), share * metric.of_rows(weight, row_weight)[0]]
        self._moments += [weight.size, float(squares.sum()), float((squares**2).sum())]
        self._channels += squares.sum(0)

        def measure(fmt: type[Format]) -> dict[tuple[str, str], list[float]]:
            found = {}
            for method, back in ways(weight, importance, fmt, name, moments, outputs, fmt.name in self._probed).items():
                delta = back - weight
                in_outputs, cost = metric.of_rows(delta, row_weight)
                if name == "token_embd.weight":
                    cost += _lookup_cost(fisher, rows, delta)
                if self._keep and method == "two_sided":
                    self.kept.setdefault(fmt.name, []).append(back)
                found[fmt.name, method] = [float(np.square(delta, dtype=np.float64).sum()), share * in_outputs, 0.5 * cost]
            return found

        for part in map_threads(measure, self._offered):
            for key, errors in part.items():
                self._errors[key] = self._errors.get(key, np.zeros(3)) + errors

    def kurtosis(self) -> float:
        """Fourth moment over the squared second: 3 for normal weights."""
        count, second, fourth = self._moments
        return float(fourth * count / max(second**2, 1e-30))

    def outlier_channels(self) -> int:
        """Input channels whose weights are over six times the median channel's size."""
        rms = np.sqrt(self._channels)
        return int((rms > 6 * np.median(rms)).sum())

    def costs(self) -> dict[str, FormatCost]:
        """Errors relative to the tensor's own size, and Fisher's KL divergence, by the method that leaves the least.

        Method two_sided is measured where a format is to be probed. For the others its gain is interpolated over the
        logarithm of the error that the next best method leaves.
        """
        weights, outputs = np.maximum(self._norms, 1e-30)
        whole = self._info.size / max(self._moments[0], 1)  # of the sample
        out: dict[str, FormatCost] = {}
        gains: list[tuple[float, float]] = []
        for (name, method), e in self._errors.items():
            cost = FormatCost(float(e[0] / weights), float(e[1] / outputs), float(e[2] * whole), method=method)
            best = out.get(name)
            if method == "two_sided" and best is not None and min(error_of(best), error_of(cost)) > 0:
                gains.append((math.log(error_of(best)), math.log(error_of(cost) / error_of(best))))
            if best is None or error_of(cost) < error_of(best):
                out[name] = cost
        if gains:
            at, gain = (list(column) for column in zip(*sorted(gains), strict=True))
            for name, cost in out.items():
                if cost.method == "ldlq" and (name, "two_sided") not in self._errors and error_of(cost) > 0:
                    factor = float(np.exp(np.interp(math.log(error_of(cost)), at, gain)))
                    if factor < 1:
                        cost.fisher_kld, cost.method = factor * cost.fisher_kld, "two_sided"
        return out


def _lookup_cost(fisher: Fisher, rows: npt.NDArray[np.int64], delta: Matrix) -> float:
    """Σ of squared gradient × squared error over the embedding rows that text looked up (a tied head comes on top)."""
    known, ours, theirs = np.intersect1d(rows, fisher.embedding_ids, assume_unique=True, return_indices=True)
    return float((delta[ours].astype(np.float64) ** 2 * fisher.embedding[theirs]).sum()) if len(known) else 0.0
