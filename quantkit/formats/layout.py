"""The vocabulary in which a block's layout is stated: planes of bits, and rules from integers to numbers.

A block is a record of fields (a NumPy structured dtype). What matters in it are vectors of small integers:
one code for each weight, one scale for each group, and so on. Their bits are spread over the fields in a few
regular ways, and one sentence covers them all (``Plane``). Decoders, packers, the drawings in
docs/formats.md and the kernels take every number from these objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

BITS = {np.dtype(f"{sign}{size}").newbyteorder("<"): 8 * size for sign in "ui" for size in (1, 2, 4)}


@dataclass(frozen=True)
class Plane:
    """Where ``bits`` bits of each integer of a vector lie.

    The field is an array of words. ``run`` consecutive integers take the same bits of ``run`` consecutive
    words; the next ``run`` integers take the next higher bits of the same words, ``count`` times; then come
    the next words. With run 1 and words of 8 bits, integers simply follow each other.

    first: lowest bit used in a word. stride: bits from one integer to the next in a word (0: ``bits``).
    words: (start, stop, step) of the words used, all by default.
    to: bit of the integer where these bits belong (0: the lowest).
    """

    field: str
    bits: int
    run: int = 1
    count: int = 0  # integers in one word; 0: as many as fit
    first: int = 0
    stride: int = 0
    words: tuple[int, int | None, int] = (0, None, 1)
    to: int = 0

    def shifts(self, layout: np.dtype) -> range:
        """Position in the word of each of the integers that share it."""
        stride = self.stride or self.bits
        count = self.count or (self._word_bits(layout) - self.first - self.bits) // stride + 1
        return range(self.first, self.first + count * stride, stride)

    def items(self, layout: np.dtype) -> int:
        """How many integers the plane covers."""
        return len(range(_length(layout, self.field))[slice(*self.words)]) * len(self.shifts(layout))

    def unpack(self, blocks: np.ndarray) -> npt.NDArray[np.uint32]:
        """The bits of every integer, moved to their place: uint32 (blocks, items)."""
        words = _unsigned(blocks, self.field)[:, slice(*self.words)]
        shifts = np.array(self.shifts(blocks.dtype), words.dtype).reshape(1, 1, -1, 1)
        found = (words.reshape(len(words), words.shape[1] // self.run, 1, self.run) >> shifts) & words.dtype.type(
            2**self.bits - 1
        )
        return found.reshape(len(words), words.shape[1] * shifts.size).astype(np.uint32) << np.uint32(self.to)

    def pack(self, values: npt.NDArray[np.uint32], blocks: np.ndarray) -> None:
        """Set the plane's bits of ``blocks`` (which must be zero there) from integers (blocks, items)."""
        words = _unsigned(blocks, self.field)[:, slice(*self.words)]
        shifts = np.array(self.shifts(blocks.dtype), np.uint32).reshape(1, 1, -1, 1)
        part = ((values >> np.uint32(self.to)) & np.uint32(2**self.bits - 1)).reshape(
            len(words), words.shape[1] // self.run, shifts.size, self.run
        )
        words |= np.bitwise_or.reduce(part << shifts, axis=2).reshape(words.shape).astype(words.dtype)

    def positions(self, layout: np.dtype) -> npt.NDArray[np.int64]:
        """Number of the bit, counted from the block's first byte, of every bit: int64 (items, bits)."""
        assert layout.fields is not None
        start = 8 * int(layout.fields[self.field][1])
        width = self._word_bits(layout)
        words = np.arange(_length(layout, self.field))[slice(*self.words)] * width + start
        shifts = np.array(self.shifts(layout)).reshape(1, -1, 1)
        lowest = (words.reshape(-1, 1, self.run) + shifts).reshape(-1, 1)
        return lowest + np.arange(self.bits)

    def _word_bits(self, layout: np.dtype) -> int:
        return BITS[layout[self.field].base]


@dataclass(frozen=True)
class Integers:
    """A vector of integers in each block: parts one after the other, each the union of some planes."""

    parts: tuple[tuple[Plane, ...], ...]
    signed: bool = False  # two's complement of the full width

    @cached_property
    def width(self) -> int:
        """Bits of one integer."""
        return max(plane.to + plane.bits for part in self.parts for plane in part)

    def items(self, layout: np.dtype) -> int:
        """How many integers there are."""
        return sum(part[0].items(layout) for part in self.parts)

    def unpack(self, blocks: np.ndarray) -> npt.NDArray[np.int32]:
        """All integers of all blocks: int32 (blocks, items)."""
        found = [np.bitwise_or.reduce([plane.unpack(blocks) for plane in part]) for part in self.parts]
        out = np.concatenate(found, axis=1).astype(np.int32)
        return (out ^ (1 << (self.width - 1))) - (1 << (self.width - 1)) if self.signed else out

    def pack(self, values: npt.NDArray[np.integer], blocks: np.ndarray) -> None:
        """Write integers (blocks, items) into blocks whose bits there are zero."""
        bits = (np.asarray(values).astype(np.int64) & (2**self.width - 1)).astype(np.uint32)
        ends = list(accumulate(part[0].items(blocks.dtype) for part in self.parts))
        for part, start, end in zip(self.parts, [0, *ends[:-1]], ends, strict=True):
            for plane in part:
                plane.pack(bits[:, start:end], blocks)

    def positions(self, layout: np.dtype) -> npt.NDArray[np.int64]:
        """Bit numbers within the block, lowest first: int64 (items, width)."""
        rows = []
        for part in self.parts:
            columns = np.full((part[0].items(layout), self.width), -1)
            for plane in part:
                columns[:, plane.to : plane.to + plane.bits] = plane.positions(layout)
            rows.append(columns)
        return np.concatenate(rows)


@dataclass(frozen=True)
class Trits:
    """Codes 0…2, five (or ``counts`` less) to a byte in base three, the first one the most significant.

    The byte is the fraction value · 256 / 3⁵ rounded up, so that multiplying by 3 pushes the next digit out
    of its top. runs: for each part (field, first byte, last byte + 1, run, digits); run as in ``Plane``.
    """

    runs: tuple[tuple[str, int, int, int, int], ...]
    width: int = 2

    def items(self, layout: np.dtype) -> int:
        """How many codes there are."""
        return sum((stop - start) * digits for _, start, stop, _, digits in self.runs)

    def unpack(self, blocks: np.ndarray) -> npt.NDArray[np.int32]:
        """All codes of all blocks: int32 (blocks, items)."""
        found = []
        for name, start, stop, run, digits in self.runs:
            raw = blocks[name][:, start:stop].reshape(len(blocks), (stop - start) // run, 1, run).astype(np.uint32)
            power = (3 ** np.arange(digits, dtype=np.uint32)).reshape(1, 1, -1, 1)
            found.append(((((raw * power) & 255) * 3) >> 8).reshape(len(blocks), (stop - start) * digits))
        return np.concatenate(found, axis=1).astype(np.int32)

    def pack(self, values: npt.NDArray[np.integer], blocks: np.ndarray) -> None:
        """Write codes (blocks, items)."""
        at = 0
        for name, start, stop, run, digits in self.runs:
            part = values[:, at : at + (stop - start) * digits].astype(np.uint32).reshape(len(blocks), -1, digits, run)
            power = (3 ** np.arange(4, 4 - digits, -1, dtype=np.int64)).astype(np.uint32).reshape(1, 1, -1, 1)
            total = (part * power).sum(2).reshape(len(blocks), -1)
            blocks[name][:, start:stop] = ((total * 256 + 242) // 243).astype(np.uint8)
            at += (stop - start) * digits


@dataclass(frozen=True)
class Linear:
    """A code stands for code − zero. count: codes that encoders may use (0: all that the bits allow)."""

    zero: int = 0
    count: int = 0


@dataclass(frozen=True)
class Table:
    """A code stands for the entry of a table: of small integers, or of any numbers in single precision."""

    entries: tuple[int, ...] | tuple[float, ...]

    @property
    def whole(self) -> bool:
        """Whether all entries are integers of eight bits."""
        return all(isinstance(entry, int) for entry in self.entries)


@dataclass(frozen=True)
class Grid:
    """A code stands for several weights at once: a row of a code book (see grids.py)."""

    name: str


@dataclass(frozen=True)
class ScaleRule:
    """Scale of a group: (d · (offset + step · integer)) · factor, in single precision and in that order."""

    offset: float = 0.0
    step: float = 1.0
    factor: float = 1.0


def at(field: str, bits: int, run: int = 1, **where: object) -> Integers:
    """Integers that one plane holds completely."""
    return Integers(((Plane(field, bits, run, **where),),))  # type: ignore[arg-type]


def over(*parts: Integers) -> Integers:
    """Integers whose bits are split over several planes: the lowest bits first."""
    planes, low = [], 0
    for part in parts:
        (plane,) = part.parts[0]
        planes.append(replace(plane, to=low))
        low += plane.bits
    return Integers((tuple(planes),))


def joined(*parts: Integers) -> Integers:
    """The integers of all parts, one after the other."""
    return Integers(tuple(piece for part in parts for piece in part.parts))


def signed(part: Integers) -> Integers:
    """The same bits read as two's complement."""
    return Integers(part.parts, signed=True)


def _length(layout: np.dtype, field: str) -> int:
    return int(np.prod(layout[field].shape, dtype=np.int64))


def _unsigned(blocks: np.ndarray, field: str) -> np.ndarray:
    """A field as unsigned words, shape (blocks, words); a view."""
    words = blocks[field]
    words = words.view(words.dtype.str.replace("i", "u").replace("f", "u"))
    return words[:, None] if words.ndim == 1 else words
