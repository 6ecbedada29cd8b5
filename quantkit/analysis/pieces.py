"""Which part of a tensor is measured: all of it, or a few pieces of a large one with the statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.analysis.moments import column_blocks
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders.stats import ActivationStats, Moments

WHOLE_WEIGHTS = 1 << 20  # larger tensors are measured on pieces
PIECE_ROWS, PIECE_COLUMNS = 128, 1024
STEP = 256  # columns at whose multiples a piece may begin
PIECES, EXPERT_PIECES = 4, 16  # of a matrix; of a tensor of experts, at most one for each
CHUNK_WEIGHTS = 1 << 21  # of a tensor that is measured whole, at a time
SHAPE_WEIGHTS = 1 << 24  # that tell how weights are distributed

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Rows and columns of one expert. rows, columns: numbers within the expert's matrix, consecutive."""

    expert: int
    rows: slice
    columns: slice

    def weight(self, checkpoint: Checkpoint, info: TensorInfo) -> Matrix:
        """The weights, float32 (rows, columns)."""
        first = self.expert * (info.rows // info.experts)
        rows = checkpoint.read_rows(info.name, first + self.rows.start, first + self.rows.stop)
        return np.ascontiguousarray(rows[:, self.columns])

    def importance(self, info: TensorInfo, stats: ActivationStats) -> Matrix | None:
        """Mean squares of the inputs, float32 (columns,)."""
        found = stats.importance(info.name, self.expert)
        return None if found is None else found[self.columns]

    def moments(self, info: TensorInfo, stats: ActivationStats) -> Moments | None:
        """Second moments of the inputs of these columns."""
        found = stats.moments_of(info.name, self.expert)
        if found is None or _all(self.columns, info.columns):
            return found
        return _part(found, self.columns, info.columns // column_blocks(info.columns))

    def outputs(self, info: TensorInfo, stats: ActivationStats) -> Moments | None:
        """Second moments of the gradients at the outputs of these rows."""
        height = stats.output_rows(info.name)
        if not height:
            return None
        first, last = self.rows.start // height * height, min(-(-self.rows.stop // height) * height, info.rows // info.experts)
        found = stats.outputs_of(info.name, self.expert, first, last)
        if found is None or (self.rows.start == first and self.rows.stop == last):
            return found
        return _part(found, slice(self.rows.start - first, self.rows.stop - first), height)


@dataclass(frozen=True)
class Shape:
    """kurtosis: fourth moment over the squared second, 3 for normal weights. outlier_channels: input channels whose
    weights are over six times the median channel's size."""

    kurtosis: float
    outlier_channels: int

    @staticmethod
    def of(checkpoint: Checkpoint, info: TensorInfo) -> Shape:
        """Of a tensor's weights; of a very large one, of every n-th chunk of rows."""
        second = fourth = 0.0
        count, channels = 0, np.zeros(info.columns)
        step = max(1, CHUNK_WEIGHTS // info.columns)
        every = max(1, info.size // SHAPE_WEIGHTS)
        for start in range(0, info.rows, step * every):
            squares = np.square(checkpoint.read_rows(info.name, start, min(start + step, info.rows)))
            channels += squares.sum(0, dtype=np.float64)
            second += float(squares.sum(dtype=np.float64))
            fourth += float(np.square(squares).sum(dtype=np.float64))
            count += squares.size
        sizes = np.sqrt(channels)
        return Shape(fourth * count / max(second**2, 1e-30), int((sizes > 6 * np.median(sizes)).sum()))


def _all(part: slice, total: int) -> bool:
    return part.start == 0 and part.stop == total


def _part(moments: Moments, part: slice, width: int) -> Moments:
    """One part of one of the diagonal blocks."""
    block = part.start // width
    inside = slice(part.start - block * width, part.stop - block * width)
    return Moments(f"{moments.key} {part}", lambda: np.asarray(moments.read()[block : block + 1, inside, inside]))


def pieces_of(info: TensorInfo, stats: ActivationStats) -> Iterator[Piece]:
    """All of a tensor, or the pieces that stand for a large one, spread evenly over experts, rows and columns.

    A whole tensor comes expert by expert, in blocks of rows that the outputs' moments tie together.
    """
    rows, together = info.rows // info.experts, stats.output_rows(info.name)
    if info.size <= WHOLE_WEIGHTS:
        step = together or max(1, CHUNK_WEIGHTS // info.columns)
        for expert in range(info.experts):
            for start in range(0, rows, step):
                yield Piece(expert, slice(start, min(start + step, rows)), slice(0, info.columns))
        return
    block = info.columns // column_blocks(info.columns)
    width = min(block, PIECE_COLUMNS) if block % STEP == 0 else block
    starts = [first + inside for first in range(0, info.columns, block) for inside in range(0, block - width + 1, STEP)]
    height = min(PIECE_ROWS, together or rows, rows)
    count = PIECES if info.experts == 1 else max(PIECES, min(info.experts, EXPERT_PIECES))
    for number in range(count):
        row = int(((number * 0.618 + 0.5) % 1) * (rows // height)) * height  # rows and columns do not go together
        column = starts[int((number + 0.5) / count * len(starts))]
        expert = int((number + 0.5) / count * info.experts)
        yield Piece(expert, slice(row, row + height), slice(column, column + width))
