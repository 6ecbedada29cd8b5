"""Numba: decoders made from the layout, with every offset and width a constant of the compiled code.

Two loops serve all formats: codes that lie in planes or digits (``plane_decoder``) and rows of a code book
(``book_decoder``). They compute what Format.decode_blocks computes, in the same order: the bits are equal.
Constants reach the loops through closures (Numba caches those by value); the helpers are inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from quantkit.formats.base import Format
from quantkit.formats.grids import grid, table
from quantkit.formats.layout import Grid, Integers, Linear, Table, Trits
from quantkit.formats.loops_bits import NUMBERS, fetch, field_offset, half_at, number_at, pieces, plane_facts, read_plane
from quantkit.formats.loops_half import OPTIONS, from_half

F32 = np.float32


def make_decoder(fmt: type[Format]) -> Callable[[np.ndarray, np.ndarray], None]:
    """The decoder of a format: (raw uint8 (blocks, bytes), out float32 (blocks, elements))."""
    return book_decoder(fmt) if isinstance(fmt.values, Grid) else plane_decoder(fmt)


def scale_facts(fmt: type[Format]) -> tuple[Any, ...]:
    """What ``fill_scales`` needs: kind, byte of the number and its type, pieces of it, pieces of the scales, sign bit, rule, table."""
    kind = 2 if fmt.scale_table else 1 if fmt.scales is not None else 0
    number = fmt.block_divisor if fmt.scale_table else fmt.block_scale
    at = field_offset(fmt, number) if isinstance(number, str) else -1
    split = pieces(fmt.block_scale if isinstance(fmt.block_scale, Integers) else None, fmt)
    flip = 1 << (fmt.scales.width - 1) if fmt.scales is not None and fmt.scales.signed else 0
    rule = fmt.scale_rule
    entries = table(fmt.scale_table) if fmt.scale_table else np.ones(1, F32)
    return (
        kind,
        at,
        NUMBERS.index(fmt.scale_type),
        split,
        pieces(fmt.scales, fmt),
        flip,
        F32(rule.offset),
        F32(rule.step),
        F32(rule.factor),
        entries,
    )


@njit(inline="always", **OPTIONS)
def fill_scales(raw, scales, groups, kind, at, number, split, where, flip, offset, step, factor, entries):
    """Scales of a block's groups, float32 (groups,). kind 0: one for the block, 1: by rule, 2: by table."""
    if kind == 2:
        for g in range(groups):
            scales[g] = entries[fetch(raw, where, g)]
        if at >= 0:
            d = number_at(raw, at, number)
            for g in range(groups):
                scales[g] = scales[g] / d
    else:
        if at >= 0:
            d = number_at(raw, at, number)
        else:
            bits = np.int32(0)
            for k in range(split.shape[0]):
                bits |= fetch(raw, split, k) << (4 * k)
            d = from_half(bits)
        if kind == 0:
            scales[0] = d
        else:
            for g in range(groups):
                scales[g] = d * (offset + step * F32((fetch(raw, where, g) ^ flip) - flip)) * factor


@njit(inline="always", **OPTIONS)
def read_digits(raw, dst, runs, scale, zero):
    """scale · (code − zero) for codes in base three. runs: int (parts, 4) of first byte, bytes, run, digits."""
    to = 0
    for k in range(runs.shape[0]):
        at, length, run, digits = runs[k, 0], runs[k, 1], runs[k, 2], runs[k, 3]
        for c in range(length // run):
            power = np.int32(1)
            for _ in range(digits):
                for i in range(run):
                    rest = (np.int32(raw[np.uintp(at + run * c + i)]) * power) & np.int32(255)
                    dst[np.uintp(to + i)] = scale * F32(((rest * np.int32(3)) >> np.int32(8)) - zero)
                to += run
                power *= np.int32(3)


def segment(fmt: type[Format]) -> int:
    """Weights in a row whose bits lie in consecutive bytes at the same shifts, with one scale; 0 if there are none."""
    if not isinstance(fmt.codes, Integers):
        return 0
    sizes = [fmt.elements // fmt.groups()]
    for plane in fmt.codes.parts[0]:
        sizes += [plane.run] if len(plane.shifts(fmt.layout)) > 1 else []
    return min(sizes) if min(sizes) >= 8 else 0


@njit(inline="always", **OPTIONS)
def place(at, bits, run, count, weight):
    """(byte, shift) of a plane for a weight that starts a segment."""
    chunk, rest = weight // (run * count), weight % (run * count)
    return at + run * chunk + rest % run, bits * (rest // run)


def plane_decoder(fmt: type[Format]) -> Callable[[np.ndarray, np.ndarray], None]:
    """Decoder of formats whose code stands for one weight."""
    elements, groups, step_size = fmt.elements, fmt.groups(), segment(fmt)
    size = elements // groups
    length = step_size or size
    kind, at, number, split, where, flip_s, offset, step, factor, entries = scale_facts(fmt)
    (at0, bits0, run0, count0, chunks0, mask0, _), (at1, bits1, run1, count1, chunks1, mask1, to1) = plane_facts(fmt)
    trits, two = isinstance(fmt.codes, Trits), mask1 > 0
    runs = np.array([(0, 0, 1, 0)])
    if isinstance(fmt.codes, Trits):
        runs = np.array([(field_offset(fmt, f) + a, b - a, run, digits) for f, a, b, run, digits in fmt.codes.runs])
    flip = 128 if isinstance(fmt.codes, Integers) and fmt.codes.signed else 0
    zero = fmt.values.zero if isinstance(fmt.values, Linear) else 0
    values = np.array(fmt.values.entries, F32) if isinstance(fmt.values, Table) else np.zeros(1, F32)
    by_table, has_minimum = isinstance(fmt.values, Table), fmt.block_minimum is not None
    zeros, has_zeros = pieces(fmt.zeros, fmt), fmt.zeros is not None
    half_minimum = field_offset(fmt, fmt.block_minimum) if fmt.block_minimum else 0
    minimums, sign, quantized_minimum = pieces(fmt.minimums, fmt), F32(fmt.minimum_sign), fmt.minimums is not None

    @njit(**OPTIONS)
    def decode(blocks, out):
        codes, scales = np.empty(elements, np.uint8), np.empty(groups, F32)
        count = out.shape[1] // (elements // length)  # = length, but a loop of known length is unrolled, not vectorized
        for b in range(blocks.shape[0]):
            raw, dst = blocks[b], out[b]
            if step_size == 0 and not trits:
                read_plane(raw, codes, at0, bits0, run0, count0, chunks0, mask0, 0)
                read_plane(raw, codes, at1, bits1, run1, count1, chunks1, mask1, to1)
            fill_scales(raw, scales, groups, kind, at, number, split, where, flip_s, offset, step, factor, entries)
            m = half_at(raw, half_minimum) if has_minimum else F32(0)
            if trits:
                read_digits(raw, dst, runs, scales[0], np.int32(zero))
                continue
            for part in range(elements // length):
                first = part * length
                s = scales[first // size]
                minimum = F32(0)
                if has_minimum:
                    minimum = sign * (m * F32(fetch(raw, minimums, first // size)) if quantized_minimum else m)
                middle = np.int32(zero)
                if has_zeros:
                    middle += fetch(raw, zeros, first // size)
                byte0, shift0 = place(at0, bits0, run0, count0, first)
                byte1, shift1 = place(at1, bits1, run1, count1, first)
                for i in range(count):
                    if step_size:
                        code = (np.int32(raw[np.uintp(byte0 + i)]) >> np.int32(shift0)) & np.int32(mask0)
                        if two:
                            code |= ((np.int32(raw[np.uintp(byte1 + i)]) >> np.int32(shift1)) & np.int32(mask1)) << np.int32(to1)
                    else:
                        code = np.int32(codes[first + i])
                    value = values[code] if by_table else F32((code ^ np.int32(flip)) - np.int32(flip) - middle)
                    dst[np.uintp(first + i)] = s * value + minimum if has_minimum else s * value

    return decode


def book_decoder(fmt: type[Format]) -> Callable[[np.ndarray, np.ndarray], None]:
    """Decoder of formats whose code is a row of a code book."""
    assert isinstance(fmt.values, Grid) and isinstance(fmt.codes, Integers)
    book = np.ascontiguousarray(grid(fmt.values.name))  # int8: small enough for the first cache
    width, groups, elements = book.shape[1], fmt.groups(), fmt.elements
    kind, at, number, split, where, flip_s, offset, step, factor, entries = scale_facts(fmt)
    codes = pieces(fmt.codes, fmt)
    signs, shifts = pieces(fmt.signs, fmt), pieces(fmt.shifts, fmt)
    has_signs, has_shifts = fmt.signs is not None, fmt.shifts is not None
    plain_signs = has_signs and fmt.signs.width == 1  # type: ignore[union-attr]
    sign_byte = int(fmt.signs.positions(fmt.layout)[0, 0]) // 8 if plain_signs else 0  # type: ignore[union-attr]
    even = table("even_signs")
    shift_size = elements // len(shifts) if has_shifts else elements
    shift, size = F32(fmt.shift), elements // groups
    factors = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), F32(-1), F32(1))

    @njit(**OPTIONS)
    def decode(blocks, out):
        scales = np.empty(groups, F32)
        for b in range(blocks.shape[0]):
            raw, dst = blocks[b], out[b]
            fill_scales(raw, scales, groups, kind, at, number, split, where, flip_s, offset, step, factor, entries)
            if has_shifts:
                for p in range(elements // shift_size):
                    up = -shift if fetch(raw, shifts, p) else shift
                    s = scales[p * shift_size // size]
                    for e in range(p * shift_size // 8, (p + 1) * shift_size // 8):
                        row = book[np.uintp(fetch(raw, codes, e))]
                        for i in range(8):
                            dst[np.uintp(8 * e + i)] = s * (F32(row[i]) + up)
            else:
                for e in range(elements // 8):
                    s = scales[8 * e // size]
                    byte = np.int32(raw[sign_byte + e]) if plain_signs else np.int32(even[fetch(raw, signs, e)])
                    sign = factors[byte]
                    for h in range(8 // width):
                        row = book[np.uintp(fetch(raw, codes, e * (8 // width) + h))]
                        for i in range(width):
                            dst[np.uintp(8 * e + h * width + i)] = s * F32(row[i]) * sign[h * width + i]

    return decode
