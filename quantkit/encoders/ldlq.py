"""Method ``ldlq``: ggml's scales, codes with error feedback through the second moments of the inputs.

The error of a column is spread over the columns that are rounded after it, so that the layer's output, not the
weight, stays close: GPTQ (arXiv 2210.17323), which equals LDLQ (arXiv 2307.13304). Columns with the largest
inputs are rounded first. Scales and minimums are those of ggml's importance-weighted search and stay as they are.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from threading import Lock

import numpy as np
import numpy.typing as npt

from quantkit.encoders.base import Encoder
from quantkit.encoders.ggml import GgmlEncoder
from quantkit.encoders.nearest import code_values, lowest_code
from quantkit.encoders.stats import Moments
from quantkit.errors import CalibrationError, FormatError
from quantkit.formats import Format
from quantkit.formats.grids import grid
from quantkit.formats.layout import Grid, Integers, Linear
from quantkit.threads import map_rows

F32 = np.float32
TOGETHER = 128  # columns that are rounded before their errors are carried on to all later ones
DAMPING = 0.1  # of the mean of the diagonal, added to it: measured best on text unlike the calibration (docs/log.md)


class Sweep:
    """The order of the columns and the factor that carries errors onward: made once for all rows of a tensor."""

    def __init__(self, moments: npt.NDArray[np.float32], together: int = 1, damping: float = DAMPING) -> None:
        """moments: float32 (columns, columns), E[x xᵀ]. together: neighbouring columns that stay side by side.

        Raises CalibrationError if the moments are not positive definite.
        """
        import scipy.linalg

        h = moments.astype(np.float64)
        diagonal = np.diag(h).copy()
        mean = max(float(diagonal.mean()), 1e-12)
        dead = diagonal <= 0
        h[dead, dead] = mean
        h[np.diag_indices_from(h)] += damping * mean
        self.units = np.argsort(-diagonal.reshape(-1, together).sum(1), kind="stable")
        self.order = (self.units[:, None] * together + np.arange(together)).reshape(-1)
        self.diagonal = (diagonal[self.order] + damping * mean).astype(F32)
        back = self.order[::-1]
        try:  # H = R Rᵀ with R upper, from the columns in reverse; then H⁻¹ = R⁻ᵀ R⁻¹, and R⁻¹ is the factor wanted
            lower = scipy.linalg.cholesky(h[np.ix_(back, back)], lower=True, overwrite_a=True)
        except np.linalg.LinAlgError as error:
            raise CalibrationError(
                f"the inputs' second moments are not positive definite ({error})", hint="use more calibration text"
            ) from None
        inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=True, overwrite_c=True)
        self.upper = np.ascontiguousarray(inverse[::-1, ::-1], F32)


_lock = Lock()


@lru_cache(maxsize=8)
def _sweeps(moments: Moments, together: int) -> list[Sweep]:
    return [Sweep(np.asarray(block), together) for block in moments.read()]


def sweeps_of(moments: Moments, together: int) -> list[Sweep]:
    """A sweep for each diagonal block of the moments; made once for the slices of a tensor."""
    with _lock:
        return _sweeps(moments, together)


class LdlqEncoder(Encoder):
    """Serves every format but those in base three and the unquantized ones."""

    method = "ldlq"
    version = 2
    needs_moments = True

    def writes(self, fmt: type[Format]) -> bool:
        """Whether codes can be chosen apart from scales."""
        return isinstance(fmt.codes, Integers)

    def encode(self, weight, importance, fmt, *, moments=None, outputs=None, threads=None, name="tensor", at=(0,)):
        if not self.writes(fmt):
            raise FormatError(
                f"{name}: method ldlq does not write {fmt.name}", hint="`quantkit formats` lists what can be written"
            )
        packed = GgmlEncoder().encode(weight, importance, fmt, threads=threads, name=name, at=at)
        if moments is None:
            return packed
        return self.refine(weight, packed, fmt, moments, outputs=outputs, threads=threads, name=name)

    def refine(self, weight, packed, fmt, moments, *, outputs=None, threads=None, name="tensor"):
        """New codes for what ggml's search has packed: uint8 (rows, bytes per row), scales and minimums unchanged.

        Raises CalibrationError if the moments belong to rows of another length or are not positive definite.
        """
        book = isinstance(fmt.values, Grid)
        x = np.ascontiguousarray(weight, F32)
        sweeps = sweeps_of(moments, 8 if book else 1)
        width = len(sweeps[0].order)
        if width * len(sweeps) != x.shape[1]:
            raise CalibrationError(
                f"{name} has rows of {x.shape[1]} weights but its moments cover {width * len(sweeps)}",
                hint="run `quantkit analyze` again",
            )
        out = np.empty_like(packed)
        step = width // fmt.elements * fmt.block_bytes()
        again = requantize_book if book else requantize
        for k, sweep in enumerate(sweeps):
            part = np.ascontiguousarray(packed[:, k * step : (k + 1) * step])
            out[:, k * step : (k + 1) * step] = again(
                np.ascontiguousarray(x[:, k * width : (k + 1) * width]), part, fmt, sweep, threads
            )
        return out


def requantize(
    x: npt.NDArray[np.float32], packed: npt.NDArray[np.uint8], fmt: type[Format], sweep: Sweep, threads: int | None
) -> npt.NDArray[np.uint8]:
    """Packed rows with new codes on the same scales. x: float32 (rows, columns); packed: uint8 (rows, bytes)."""
    from quantkit.encoders.loops_feedback import LANES, feedback

    rows, columns = x.shape
    parts, blocks = fmt.unpack(packed), fmt.blocks(packed)
    size = fmt.elements // fmt.groups()
    scale = fmt.block_scales(blocks).reshape(rows, columns // size)
    minimum = fmt.block_minimums(blocks).reshape(rows, columns // size)
    values = code_values(fmt)
    linear = isinstance(fmt.values, Linear)
    order = np.argsort(values, kind="stable")
    ladder = values[order]
    middles = (ladder[1:] + ladder[:-1]) / 2
    codes = np.empty((rows, columns), np.int32)
    group = (sweep.order // size).astype(np.int64)
    bounds = [*range(0, columns, TOGETHER), columns]

    def work(part: slice) -> None:
        for start in range(part.start, part.stop, LANES):
            stop = min(start + LANES, part.stop)
            pad = ((0, 0), (0, LANES - (stop - start)))
            w = np.ascontiguousarray(np.pad(x[start:stop, sweep.order].T, pad))
            s, m = (np.ascontiguousarray(np.pad(a[start:stop].T, pad)) for a in (scale, minimum))
            found, errors = np.empty((columns, LANES), np.int32), np.empty((TOGETHER, LANES), F32)
            for first, last in itertools.pairwise(bounds):
                feedback(
                    w, first, last, sweep.upper, s, m, group, linear, F32(0), F32(len(values) - 1), F32(-ladder[0]), ladder,
                    middles, found, errors,
                )  # fmt: skip
                w[last:] -= sweep.upper[first:last, last:].T @ errors[: last - first]
            codes[start:stop, sweep.order] = found[:, : stop - start].T

    map_rows(work, rows, columns, threads)
    numbers = codes if linear else order[codes]
    parts["codes"] = (numbers + lowest_code(fmt)).reshape(len(blocks), fmt.elements)
    return fmt.pack(parts).reshape(rows, -1)


def requantize_book(
    x: npt.NDArray[np.float32], packed: npt.NDArray[np.uint8], fmt: type[Format], sweep: Sweep, threads: int | None
) -> npt.NDArray[np.uint8]:
    """The same for formats whose code is a row of a code book. ``sweep`` keeps eights of columns together."""
    from quantkit.encoders.books import book
    from quantkit.encoders.loops_feedback import feedback_book

    assert isinstance(fmt.values, Grid) and fmt.codes is not None
    rows, columns = x.shape
    parts, blocks = fmt.unpack(packed), fmt.blocks(packed)
    values = grid(fmt.values.name)
    _, index, start, neighbours = book(fmt.values.name)
    levels = np.unique(values).astype(F32)
    middles = (levels[1:] + levels[:-1]) / 2
    width, bits, size = values.shape[1], 2 if len(levels) < 4 else 3, fmt.elements // fmt.groups()
    scale = fmt.block_scales(blocks).reshape(rows, columns // size)
    shift = np.zeros((rows, columns // 8), F32)
    if "shifts" in parts:
        down = parts["shifts"].reshape(rows, -1)
        shift = np.repeat(F32(fmt.shift) * (1 - 2 * down).astype(F32), columns // 8 // down.shape[1], axis=1)
    codes = parts["codes"].reshape(rows, -1).astype(np.int32)
    even = fmt.signs is not None and fmt.signs.width == 7
    signs = np.zeros((rows, columns // 8), np.int32)
    bounds = [*range(0, columns, TOGETHER), columns]

    def work(part: slice) -> None:
        w = x[part][:, sweep.order]
        for first, last in itertools.pairwise(bounds):
            errors = np.empty((len(w), last - first), F32)
            feedback_book(
                w, first, last, sweep.upper, sweep.units, sweep.diagonal, scale[part], shift[part], size, width, bits,
                fmt.signs is not None, even, middles, values, index, start, neighbours, codes[part], signs[part], errors,
            )  # fmt: skip
            w[:, last:] -= errors @ sweep.upper[first:last, last:]

    map_rows(work, rows, columns, threads)
    parts["codes"] = codes.reshape(len(blocks), -1)
    if even:
        parts["signs"] = (signs & 127).reshape(len(blocks), -1)
    elif fmt.signs is not None:
        parts["signs"] = ((signs[..., None] >> np.arange(8)) & 1).reshape(len(blocks), -1)
    return fmt.pack(parts).reshape(rows, -1)
