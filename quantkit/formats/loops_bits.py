"""Numba: integers in and out of a block's bytes, from the statement of where their bits lie."""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.formats.base import Format
from quantkit.formats.layout import Integers, Trits
from quantkit.formats.loops_half import OPTIONS, from_half

NOWHERE = np.zeros((1, 1, 4), np.int32)
NUMBERS = ("F16", "BF16", "F32")  # types of floating-point fields, as ``number_at`` counts them


def field_offset(fmt: type[Format], name: str) -> int:
    """Byte at which a field of the block starts."""
    assert fmt.layout.fields is not None
    return int(fmt.layout.fields[name][1])


def pieces(part: Integers | Trits | None, fmt: type[Format]) -> np.ndarray:
    """Integers as what to fetch from single bytes: int32 (items, pieces, 4) of byte, shift, mask, place."""
    if not isinstance(part, Integers):
        return NOWHERE
    rows = []
    for positions in part.positions(fmt.layout):
        found: list[list[int]] = []
        for bit, position in enumerate(positions):
            byte, shift = divmod(int(position), 8)
            if found and found[-1][0] == byte and found[-1][1] + found[-1][2].bit_length() == shift:
                found[-1][2] = 2 * found[-1][2] + 1
            else:
                found.append([byte, shift, 1, bit])
        rows.append(found)
    width = max(len(row) for row in rows)
    return np.array([row + [[0, 0, 0, 0]] * (width - len(row)) for row in rows], np.int32)


def plane_facts(fmt: type[Format]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(byte, bits, run, integers in a word, chunks, mask, place) of the low and the high plane of a format's codes."""
    nothing = (0, 1, 1, 1, 0, 0, 0)
    if not isinstance(fmt.codes, Integers):
        return nothing, nothing
    found = []
    for p in fmt.codes.parts[0]:
        count = len(p.shifts(fmt.layout))
        found.append((field_offset(fmt, p.field), p.bits, p.run, count, fmt.elements // (p.run * count), 2**p.bits - 1, p.to))
    return found[0], found[1] if len(found) > 1 else nothing


@njit(inline="always", **OPTIONS)
def fetch(raw, where, item):
    """One integer of a block from its pieces."""
    value = np.int32(0)
    for p in range(where.shape[1]):
        value |= ((np.int32(raw[np.uintp(where[item, p, 0])]) >> where[item, p, 1]) & where[item, p, 2]) << where[item, p, 3]
    return value


@njit(inline="always", **OPTIONS)
def store(raw, where, item, value):
    """Set the bits of one integer in a block whose bits there are zero."""
    for p in range(where.shape[1]):
        part = ((np.int32(value) >> where[item, p, 3]) & where[item, p, 2]) << where[item, p, 1]
        raw[where[item, p, 0]] |= np.uint8(part)


@njit(inline="always", **OPTIONS)
def half_at(raw, at):
    """The half-precision number at a byte."""
    return from_half(np.uint16(raw[at]) | (np.uint16(raw[at + 1]) << np.uint16(8)))


@njit(inline="always", **OPTIONS)
def number_at(raw, at, number):
    """The floating-point number at a byte. number: its type's place in NUMBERS."""
    if number == 0:
        return half_at(raw, at)
    bits = np.uint32(0)
    for k in range(2 * number):
        bits |= np.uint32(raw[at + k]) << np.uint32(8 * k)
    bits <<= np.uint32(16 if number == 1 else 0)
    return np.uint32(bits).view(np.float32)


@njit(inline="always", **OPTIONS)
def put_half(raw, at, bits):
    """Write the bits of a half-precision number, little-endian."""
    raw[at] = np.uint8(bits & 255)
    raw[at + 1] = np.uint8(bits >> 8)


@njit(inline="always", **OPTIONS)
def read_plane(raw, codes, at, bits, run, count, chunks, mask, to):
    """Codes, uint8 (elements,), from one plane (to = 0: set, else added)."""
    for c in range(chunks):
        for j in range(count):
            for i in range(run):
                part = (raw[at + run * c + i] >> np.uint8(bits * j)) & np.uint8(mask)
                if to == 0:
                    codes[run * (c * count + j) + i] = part
                else:
                    codes[run * (c * count + j) + i] |= part << np.uint8(to)


@njit(**OPTIONS)
def write_plane(codes, raw, at, bits, run, count, chunks, mask, to):
    """The inverse of ``read_plane``: codes are integers, the plane's bytes are overwritten."""
    for c in range(chunks):
        for i in range(run):
            byte = 0
            for j in range(count):
                byte |= ((codes[run * (c * count + j) + i] >> to) & mask) << (bits * j)
            raw[at + run * c + i] = np.uint8(byte)


@njit(**OPTIONS)
def store_all(raw, where, values):
    """``store`` for every integer of a vector."""
    for item in range(where.shape[0]):
        store(raw, where, item, values[item])
