"""A few rows of the matrices that read a group's channels, and what formats leave of them.

Everything here is the same for a group whatever powers of two its channels were scaled with before: rows count by
their relative error, columns by products of weight and input. That is what makes a hidden rescaling visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import Format
from quantkit.quantizer.fold_groups import Group, Ints, Member

ROWS, FEWEST = 128, 16  # rows read for a group, and of each matrix at least
WEIGHTS = 1 << 18  # of a sample at most, unless FEWEST rows are more
EQUALIZED = 4  # rounds of equalizing rows and columns where nothing is known of the inputs
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """weights: float32 (rows, columns); importance: float64 (columns,), mean square of the inputs; channel: of each column."""

    weights: npt.NDArray[np.float32]
    importance: Floats
    channel: Ints

    def sizes(self) -> tuple[Floats, Floats]:
        """Mean square of inputs and of weights by channel, float64 (channels,). Each row's weights are taken in
        relation to its output, so that neither large rows nor large columns hide the others."""
        squares = self.weights.astype(np.float64) ** 2
        outputs = squares @ self.importance
        columns = (squares / np.maximum(outputs, 1e-300)[:, None]).mean(0)
        times = np.bincount(self.channel)
        return tuple(np.bincount(self.channel, values) / times for values in (self.importance, columns))  # type: ignore[return-value]

    def changed(self, exponents: Ints, columns: Ints | None = None) -> Sample:
        """Columns times powers of two (by channel), inputs divided by them; then in another order (old column of each new)."""
        each = exponents[self.channel]
        weights, importance = np.ldexp(self.weights, each), np.ldexp(self.importance, -2 * each)
        order = slice(None) if columns is None else columns
        return Sample(np.ascontiguousarray(weights[:, order]), importance[order], self.channel)

    def loss(self, formats: list[type[Format]], name: str) -> float:
        """Logarithm of the relative error of the outputs, mean over rows, geometric mean over formats."""
        weight = self.importance / max(float(self.importance.mean()), 1e-300)
        squares = self.weights.astype(np.float64) ** 2
        outputs = np.maximum(squares @ weight, 1e-300)
        total = 0.0
        for fmt in formats:
            encoder = get_encoder(default_method(fmt))
            back = fmt.decode(encoder.encode(self.weights, weight.astype(np.float32), fmt, name=name))
            errors = (back.astype(np.float64) - self.weights) ** 2 @ weight
            total += float(np.log(max(float((errors / outputs).mean()), 1e-30)))
        return total / len(formats)


def sample_of(checkpoint: Checkpoint, group: Group, stats: ActivationStats | None) -> Sample | None:
    """Rows spread over all matrices that are quantized and read the group; None if there is none."""
    readers = [member for member in group.readers if checkpoint.info(member.name).quantizable]
    if not readers:
        return None
    columns = len(readers[0].channel)
    count = max(FEWEST, min(ROWS, WEIGHTS // columns) // len(readers))
    weights = np.concatenate([_rows(checkpoint, member, count) for member in readers])
    importance = _importance(group, stats, columns)
    return Sample(weights, _equalizing(weights) if importance is None else importance, readers[0].channel)


def _rows(checkpoint: Checkpoint, member: Member, count: int) -> npt.NDArray[np.float32]:
    """At most ``count`` rows of a matrix, or of one expert of it, spread evenly."""
    info = checkpoint.info(member.name)
    rows = info.rows if member.expert is None else info.rows // info.experts
    first = 0 if member.expert is None else member.expert * rows
    chosen = np.unique(np.linspace(first, first + rows - 1, min(count, rows)).astype(int))
    return np.concatenate([checkpoint.read_rows(member.name, int(row), int(row) + 1) for row in chosen])


def _importance(group: Group, stats: ActivationStats | None, columns: int) -> Floats | None:
    """Mean square of the inputs over all tokens that reached the readers, None if nothing is known of any."""
    sums, tokens = np.zeros(columns), 0.0
    for member in group.readers:
        entry = stats.tensors.get(member.name) if stats is not None else None
        if entry is None:
            continue
        for expert in range(len(entry.counts)) if member.expert is None else (member.expert,):
            found = entry.importance(expert)
            if found is not None:
                weight = max(float(entry.counts[expert]), 1.0)
                sums, tokens = sums + weight * found.astype(np.float64), tokens + weight
    return sums / tokens if sums.any() else None


def _equalizing(weights: npt.NDArray[np.float32]) -> Floats:
    """The inputs that would make all columns matter alike, for weights of which no input is known."""
    squares = weights.astype(np.float64) ** 2
    importance = np.ones(weights.shape[1])
    for _ in range(EQUALIZED):
        rows = np.maximum(squares @ importance, 1e-300)
        importance = 1 / np.maximum((squares / rows[:, None]).mean(0), 1e-300)
        importance /= np.median(importance)
    return importance
