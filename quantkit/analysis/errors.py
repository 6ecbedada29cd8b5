"""What each format really costs a tensor: its weights through the real encoders, and the error they leave."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from quantkit.analysis.fisher import Fisher
from quantkit.analysis.pieces import Piece, Shape, pieces_of
from quantkit.analysis.predict import error_of, probe_formats
from quantkit.analysis.sensitivity import FormatCost, TensorSensitivity
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.ldlq import LdlqEncoder
from quantkit.encoders.stats import ActivationStats, Moments
from quantkit.formats import Format, formats, get_format
from quantkit.progress import Progress
from quantkit.threads import map_threads

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
    sums = _Sums(info, offered_formats(info, stats), stats, fisher, keep=decoded is not None)
    shape = Shape.of(checkpoint, info)
    for piece in pieces_of(info, stats):
        share = float(entry.shares[piece.expert]) if entry is not None and info.experts > 1 else 1.0
        sums.add(piece, piece.weight(checkpoint, info), share)
    if decoded is not None:
        for name, pieces in sums.kept.items():
            if sum(map(len, pieces)) == info.rows:
                decoded[info.name, name, "two_sided"] = np.concatenate(pieces).reshape(info.shape)
    return TensorSensitivity(
        role=info.role.value,
        layer=info.layer,
        shape=info.shape,
        kurtosis=shape.kurtosis,
        outlier_channels=shape.outlier_channels,
        uncovered_experts=entry.uncovered if entry else [],
        formats=sums.costs(),
    )


class _Sums:
    """Adds up the errors of one tensor over its pieces, for every format and method."""

    def __init__(
        self, info: TensorInfo, offered: list[type[Format]], stats: ActivationStats, fisher: Fisher, keep: bool = False
    ) -> None:
        self._info, self._offered, self._stats, self._fisher, self._keep = info, offered, stats, fisher, keep
        self._probed = set(probe_formats(info, [fmt.name for fmt in offered]))
        self._errors: dict[tuple[str, str], npt.NDArray[np.float64]] = {}  # weight, activation, Fisher, lookup
        self.kept: dict[str, list[Matrix]] = {}  # what two_sided gave back, by format
        self._norms = np.zeros(2)  # of the weights, of the outputs
        self._seen = np.zeros(3)  # weights, and mass behind the Fisher and the lookup cost, of the pieces

    def add(self, piece: Piece, weight: Matrix, share: float) -> None:
        """One piece of the tensor, float32 (rows, columns). share: of the squared output that enters through its expert."""
        info, name, stats = self._info, self._info.name, self._stats
        importance, moments, outputs = piece.importance(info, stats), piece.moments(info, stats), piece.outputs(info, stats)
        metric = Metric(weight.shape[1], importance, moments, outputs)
        row_weight = self._fisher.rows[name][piece.expert][piece.rows] if name in self._fisher.rows else np.zeros(len(weight))
        self._norms += [float(np.square(weight, dtype=np.float64).sum()), share * metric.of_rows(weight, row_weight)[0]]
        self._seen += [weight.size, self._mass(piece), self._lookup(piece)[1]]

        def measure(fmt: type[Format]) -> dict[tuple[str, str], list[float]]:
            found = {}
            for method, back in ways(weight, importance, fmt, name, moments, outputs, fmt.name in self._probed).items():
                delta = back - weight
                in_outputs, cost = metric.of_rows(delta, row_weight)
                if self._keep and method == "two_sided":
                    self.kept.setdefault(fmt.name, []).append(back)
                squared = float(np.square(delta, dtype=np.float64).sum())
                found[fmt.name, method] = [squared, share * in_outputs, 0.5 * cost, 0.5 * self._lookup(piece, delta)[0]]
            return found

        for part in map_threads(measure, self._offered):
            for key, errors in part.items():
                self._errors[key] = self._errors.get(key, np.zeros(4)) + errors

    def _mass(self, piece: Piece) -> float:
        """Σ of the rows' Fisher information × Σ of the columns' importance: an error of one weight's size, all over it, costs that."""
        rows = self._fisher.rows.get(self._info.name)
        importance = piece.importance(self._info, self._stats)
        of_rows = piece.rows.stop - piece.rows.start if rows is None else rows[piece.expert][piece.rows].sum()
        return float(of_rows * (piece.columns.stop - piece.columns.start if importance is None else importance.sum()))

    def _lookup(self, piece: Piece, delta: Matrix | None = None) -> tuple[float, float]:
        """What errors in embedding rows that text looked up cost (a tied head comes on top), and their mass: (Σ g² δ², Σ g²)."""
        fisher = self._fisher
        if self._info.name != "token_embd.weight":
            return 0.0, 0.0
        rows = np.arange(piece.rows.start, piece.rows.stop)
        _, ours, theirs = np.intersect1d(rows, fisher.embedding_ids, assume_unique=True, return_indices=True)
        weight = fisher.embedding[theirs][:, piece.columns]
        cost = 0.0 if delta is None else float((delta[ours].astype(np.float64) ** 2 * weight).sum())
        return cost, float(weight.sum())

    def _scales(self) -> tuple[float, float]:
        """From the pieces to the whole tensor: factors of the Fisher and of the lookup cost.

        Errors are alike all over a tensor; what they cost is not, and is known for all of it.
        """
        info = self._info
        if self._seen[0] == info.size:
            return 1.0, 1.0
        rows, columns = slice(0, info.rows // info.experts), slice(0, info.columns)
        mass = sum(self._mass(Piece(expert, rows, columns)) for expert in range(info.experts))
        lookup = float(self._fisher.embedding.sum())
        return mass / max(self._seen[1], 1e-300), lookup / self._seen[2] if self._seen[2] > 0 else 0.0

    def costs(self) -> dict[str, FormatCost]:
        """Errors relative to the tensor's own size, and Fisher's KL divergence, by the method that leaves the least.

        Method two_sided is measured where a format is to be probed. For the others its gain is interpolated over the
        logarithm of the error that the next best method leaves.
        """
        weights, outputs = np.maximum(self._norms, 1e-30)
        by_rows, by_lookup = self._scales()
        out: dict[str, FormatCost] = {}
        searched: dict[str, float] = {}
        gains: list[tuple[float, float]] = []
        for (name, method), e in self._errors.items():
            cost = FormatCost(
                float(e[0] / weights), float(e[1] / outputs), float(e[2] * by_rows + e[3] * by_lookup), method=method
            )
            best = out.get(name)
            searched.setdefault(name, cost.fisher_kld)  # ways gives ggml's search first
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
        for name, cost in out.items():
            cost.search_kld = searched[name]
        return out
