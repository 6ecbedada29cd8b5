"""Methods ``search`` and ``two_sided``: descent on codes, scales and minimums in the metric of the outputs.

Both start from ``ldlq``. The error Δ of a matrix costs ½ tr(O Δ I Δᵀ): I holds the second moments of its inputs, O
those of the gradients at its outputs (how much the model's distribution cares about each of them, and about their
combinations: Kronecker-factored curvature, Martens and Grosse, arXiv 1503.05671; as a metric for rounding in YAQA,
arXiv 2505.22988). ``search`` takes O = identity. Scales are changed as they are stored, rounded, so nothing is lost
afterwards.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.encoders.ldlq import DAMPING, LdlqEncoder
from quantkit.encoders.parameters import Parameters
from quantkit.encoders.stats import Moments
from quantkit.errors import CalibrationError
from quantkit.formats import Format
from quantkit.formats.grids import grid
from quantkit.formats.layout import Grid

F32 = np.float32
BLOCK = 256  # columns changed together
PANEL = 32  # rows whose influence on each other is followed one by one
SWEEPS = 3
OUTPUT_DAMPING = 0.05  # of the mean of the diagonal of the outputs' moments, added to it

Matrix = npt.NDArray[np.float32]


def damped(moments: npt.NDArray[np.float32], share: float) -> Matrix:
    """Second moments (n, n) with ``share`` of the mean of their diagonal added to it; ones where all is zero."""
    h = np.array(moments, F32)
    mean = float(np.trace(h)) / len(h)
    h[np.diag_indices(len(h))] += F32(share * mean if mean > 0 else 1.0)
    return h


class SearchEncoder(LdlqEncoder):
    """Rows do not depend on each other."""

    method = "search"

    def refine(self, weight, packed, fmt, moments, *, outputs=None, threads=None, name="tensor"):
        """Better codes, scales and minimums for what ggml's search has packed: uint8 (rows, bytes per row)."""
        start = LdlqEncoder.refine(self, weight, packed, fmt, moments, threads=threads, name=name)
        return improve(np.ascontiguousarray(weight, F32), start, fmt, moments, None, name)


class TwoSidedEncoder(SearchEncoder):
    """Rows matter as much as the model's outputs depend on them, alone and together."""

    method = "two_sided"
    uses_outputs = True

    def refine(self, weight, packed, fmt, moments, *, outputs=None, threads=None, name="tensor"):
        """The same in the two-sided metric. Without the outputs' moments it is ``search``."""
        start = LdlqEncoder.refine(self, weight, packed, fmt, moments, threads=threads, name=name)
        return improve(np.ascontiguousarray(weight, F32), start, fmt, moments, outputs, name)


def improve(
    weight: Matrix,
    packed: npt.NDArray[np.uint8],
    fmt: type[Format],
    moments: Moments,
    outputs: Moments | None,
    name: str = "tensor",
) -> npt.NDArray[np.uint8]:
    """Descend from ``packed``. weight: float32 (rows, columns); outputs: blocks that together cover the rows.

    Raises CalibrationError if the moments do not cover the matrix.
    """
    inner = [damped(block, DAMPING) for block in moments.read()]
    outer = None if outputs is None else [damped(block, OUTPUT_DAMPING) for block in outputs.read()]
    rows, columns = weight.shape
    if sum(map(len, inner)) != columns or (outer is not None and sum(map(len, outer)) != rows):
        raise CalibrationError(f"the moments do not cover {name} ({rows} × {columns})", hint="run `quantkit analyze` again")
    out = np.empty_like(packed)
    bounds = np.cumsum([0, *(map(len, outer) if outer is not None else [rows])])
    for k, (first, last) in enumerate(itertools.pairwise(bounds)):
        numbers = Parameters(packed[first:last], fmt)
        for turn in range(SWEEPS):
            _sweep(numbers, weight[first:last], inner, None if outer is None else outer[k], tune=turn > 0)
        out[first:last] = numbers.pack()
    return out


def _sweep(numbers: Parameters, weight: Matrix, inner: list[Matrix], outer: Matrix | None, tune: bool) -> None:
    """All blocks of columns once."""
    start = 0
    for metric in inner:
        part = slice(start, start + len(metric))
        width = BLOCK if len(metric) % BLOCK == 0 else len(metric)
        for column in range(0, len(metric), width):
            delta = numbers.weight[:, part] - weight[:, part]
            gradient: Matrix = delta @ metric[:, column : column + width]  # type: ignore[assignment]
            if outer is not None:
                gradient = outer @ gradient  # type: ignore[assignment]
            own = np.ascontiguousarray(metric[column : column + width, column : column + width])
            _columns(numbers, start + column, own, outer, gradient, tune)
        start += len(metric)


def _columns(numbers: Parameters, first: int, inner: Matrix, outer: Matrix | None, gradient: Matrix, tune: bool) -> None:
    """One block of columns of all rows, a panel at a time."""
    from quantkit.encoders.loops_descent import descend

    rows, width = len(numbers.weight), len(inner)
    fixed = _fixed(numbers)
    per = numbers.block // numbers.group

    def view(array: np.ndarray, size: int, part: slice) -> np.ndarray:
        return array[part, first // size : (first + width) // size] if array.shape[1] else array[part]

    for row in range(0, rows, PANEL):
        part = slice(row, min(row + PANEL, rows))
        among = np.eye(part.stop - row, dtype=F32) if outer is None else outer[part, part]
        codes, size = (numbers.entries, fixed["width"]) if numbers.book else (numbers.values, 1)
        views = [
            view(numbers.weight, 1, part), view(codes, size, part),
            view(numbers.signs, 8, part) if numbers.book else NO_INTEGERS[part],
            view(numbers.shift, 8, part) if numbers.book else NO_NUMBERS[part],
            view(numbers.scale, numbers.group, part), view(numbers.minimum, numbers.group, part),
            view(numbers.block_scale, numbers.block, part), view(numbers.block_minimum, numbers.block, part),
        ]  # fmt: skip
        w, c, signs, shift, places, integers, d, dmin = (np.ascontiguousarray(v) for v in views)
        g = np.ascontiguousarray(gradient[part])
        descend(
            g, np.ascontiguousarray(among), inner, w, c, signs, shift, places, numbers.factors, integers, numbers.top, d, dmin,
            numbers.group, per, numbers.tunes_scale, tune, **fixed,
        )  # fmt: skip
        for target, changed in zip(views, (w, c, signs, shift, places, integers, d, dmin), strict=True):
            target[...] = changed
        if outer is not None and part.stop < rows:
            gradient[part.stop :] += outer[part.stop :, part] @ g


NO_INTEGERS, NO_NUMBERS = np.zeros((1 << 16, 0), np.int32), np.zeros((1 << 16, 0), F32)


def _fixed(numbers: Parameters) -> dict[str, Any]:
    """What the loop must know of a format's codes."""
    fmt = numbers.fmt
    if not numbers.book:
        ladder = numbers.ladder
        return {
            "linear": numbers.linear, "ladder": ladder, "middles": (ladder[1:] + ladder[:-1]) / 2, "width": 0, "bits": 0,
            "signed": False, "even": False, "book": np.zeros((1, 1), np.int8), "index": np.zeros(1, np.int32),
            "start": np.zeros(1, np.int32), "neighbours": np.zeros(1, np.int32),
        }  # fmt: skip
    from quantkit.encoders.books import book

    assert isinstance(fmt.values, Grid)
    values = grid(fmt.values.name)
    _, index, start, neighbours = book(fmt.values.name)
    levels = np.unique(values).astype(F32)
    return {
        "linear": False, "ladder": levels, "middles": (levels[1:] + levels[:-1]) / 2, "width": values.shape[1],
        "bits": 2 if len(levels) < 4 else 3, "signed": fmt.signs is not None, "even": fmt.signs is not None and fmt.signs.width == 7,
        "book": values, "index": index, "start": start, "neighbours": neighbours,
    }  # fmt: skip
