"""Packed rows taken apart into numbers that a search can change, and put together again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.encoders.nearest import code_values, lowest_code, scale_factors
from quantkit.formats import Format
from quantkit.formats.grids import table
from quantkit.formats.layout import Grid, Integers, Linear

F32 = np.float32
EMPTY = np.zeros(0, F32)


class Parameters:
    """What the bytes of a matrix say, by row. All arrays may be changed in place before ``pack``.

    weight: float32 (rows, columns), as decoded. block_scale, block_minimum: float32 (rows, blocks), numbers that half
    precision holds; ones where a format has none. scale, minimum: int32 (rows, groups), places in ``factors`` and integers from 0 to
    ``top``; no columns where a format has none. Formats with a code for each weight have ``values``, float32 (rows,
    columns), each an entry of ``ladder``; code books have ``entries`` int32 (rows, columns / width), ``signs`` int32
    (rows, columns / 8), a byte each, and ``shift`` float32 (rows, columns / 8).
    """

    def __init__(self, packed: npt.NDArray[np.uint8], fmt: type[Format]) -> None:
        assert isinstance(fmt.codes, Integers)
        self.fmt = fmt
        self._parts = fmt.unpack(packed)
        rows = len(packed)
        self.weight = fmt.decode(packed)
        columns = self.weight.shape[1]
        self.group, self.block = fmt.elements // fmt.groups(), fmt.elements
        self.book = isinstance(fmt.values, Grid)
        self._read_scales(rows)
        if self.book:
            self.entries = self._parts["codes"].reshape(rows, -1).astype(np.int32)
            self.signs = np.zeros((rows, columns // 8), np.int32)
            self.shift = np.zeros((rows, columns // 8), F32)
            self._read_signs(rows, columns)
            return
        listed = code_values(fmt)
        self._order = np.argsort(listed, kind="stable")
        self.ladder = listed[self._order]
        self.linear = isinstance(fmt.values, Linear)
        self.values = listed[self._parts["codes"].reshape(rows, columns) - lowest_code(fmt)]

    def _read_scales(self, rows: int) -> None:
        fmt, parts = self.fmt, self._parts
        self.tunes_scale = fmt.scale_table is None
        blocks = len(parts["codes"])
        if fmt.scale_table is not None:
            self.factors, self._first = table(fmt.scale_table).astype(F32), 0
            d: np.ndarray = np.ones(blocks, F32)
        else:
            integers, self.factors = scale_factors(fmt) if fmt.scales is not None else (np.zeros(1, np.int64), EMPTY)
            self._first = int(integers[0])
            d = (
                _joined(parts["block_scale"], fmt.block_scale)
                if isinstance(fmt.block_scale, Integers)
                else parts[str(fmt.block_scale)]
            )
        self.block_scale = d.astype(F32).reshape(rows, -1)
        self.scale = np.zeros((rows, 0), np.int32)
        if fmt.scales is not None:
            self.scale = (parts["scales"].reshape(rows, -1) - self._first).astype(np.int32)
        self.has_minimum = fmt.block_minimum is not None
        self.block_minimum = np.zeros((rows, 0), F32)
        if fmt.block_minimum is not None:
            self.block_minimum = F32(fmt.minimum_sign) * parts[fmt.block_minimum].astype(F32).reshape(rows, -1)
        self.minimum, self.top = np.zeros((rows, 0), np.int32), 0
        if fmt.minimums is not None:
            self.minimum, self.top = parts["minimums"].reshape(rows, -1).astype(np.int32), 2**fmt.minimums.width - 1

    def _read_signs(self, rows: int, columns: int) -> None:
        fmt, parts = self.fmt, self._parts
        if "shifts" in parts:
            down = parts["shifts"].reshape(rows, -1)
            self.shift = np.repeat(F32(fmt.shift) * (1 - 2 * down).astype(F32), columns // 8 // down.shape[1], axis=1)
        if fmt.signs is not None:
            bits = parts["signs"].reshape(rows, columns // 8, -1)
            whole = table("even_signs")[bits[..., 0]] if fmt.signs.width == 7 else (bits << np.arange(8)).sum(-1)
            self.signs = whole.astype(np.int32)

    def pack(self) -> npt.NDArray[np.uint8]:
        """The rows as bytes: uint8 (rows, bytes per row)."""
        fmt, parts = self.fmt, dict(self._parts)
        rows, blocks = len(self.weight), len(parts["codes"])
        if fmt.scales is not None:
            parts["scales"] = (self.scale + self._first).reshape(blocks, -1)
        if self.tunes_scale:
            d = self.block_scale.astype(np.float16).reshape(blocks)
            if isinstance(fmt.block_scale, Integers):
                parts["block_scale"] = _split(d, fmt.block_scale)
            else:
                parts[str(fmt.block_scale)] = d.reshape(parts[str(fmt.block_scale)].shape)
        if fmt.block_minimum is not None:
            shape = parts[fmt.block_minimum].shape
            parts[fmt.block_minimum] = (F32(fmt.minimum_sign) * self.block_minimum).astype(np.float16).reshape(shape)
        if fmt.minimums is not None:
            parts["minimums"] = self.minimum.reshape(blocks, -1)
        if self.book:
            parts["codes"] = self.entries.reshape(blocks, -1)
            if fmt.signs is not None and fmt.signs.width == 7:
                parts["signs"] = (self.signs & 127).reshape(blocks, -1)
            elif fmt.signs is not None:
                parts["signs"] = ((self.signs[..., None] >> np.arange(8)) & 1).reshape(blocks, -1)
        else:
            codes = self._order[np.searchsorted(self.ladder, self.values)] + lowest_code(fmt)
            parts["codes"] = codes.reshape(blocks, -1)
        return fmt.pack(parts).reshape(rows, -1)


def _joined(pieces: np.ndarray, part: Integers) -> npt.NDArray[np.float16]:
    """The half-precision number whose bits lie in several words."""
    return (pieces << (part.width * np.arange(pieces.shape[1]))).sum(1).astype(np.uint16).view(np.float16)


def _split(d: npt.NDArray[np.float16], part: Integers) -> npt.NDArray[np.int32]:
    places = np.arange(16 // part.width) * part.width
    return (d.view(np.uint16).astype(np.int32)[:, None] >> places) & (2**part.width - 1)
