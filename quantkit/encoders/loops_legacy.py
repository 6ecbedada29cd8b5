"""Numba: ggml's 32-weight encoders (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c. Signatures as in loops_kquants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from quantkit.encoders.loops_kquants import block_weights, weight_lanes
from quantkit.encoders.loops_scales import (
    FIT,
    MINIMUM,
    ONE,
    SCALE,
    ZERO,
    affine_codes,
    affine_search,
    extremes,
    first_of,
    load_lanes,
    symmetric_search,
)
from quantkit.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from quantkit.formats.loops_bits import field_offset, plane_facts, put_half, write_plane
from quantkit.formats.loops_half import OPTIONS, to_half

(P40, NONE), (P41, _), (P50, H50), (P51, H51) = (plane_facts(f) for f in (Q4_0, Q4_1, Q5_0, Q5_1))
B40, B41, B50, B51, B80 = (f.block_bytes() for f in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0))
D, M, Q8_CODES = field_offset(Q4_0, "d"), field_offset(Q4_1, "m"), field_offset(Q8_0, "qs")


@njit(**OPTIONS)
def row_mean_square(row):
    """Mean of squares over the whole row, accumulated in order."""
    total = ZERO
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    return total / np.float32(row.shape[0])


@njit(inline="always", **OPTIONS)
def plain_scale(row, at, half_range, top):
    """(scale, minimum or 0, inverse scale, offset of the code) of a block without importance."""
    low, high = extremes(row, at, 32)
    if half_range > 0:
        peak = high if high > -low else low
        if high == -low:
            peak = first_of(row, at, 32, high)
        d = peak / np.float32(-half_range)
        inverse = ONE / d if d != ZERO else ZERO
        return d, ZERO, inverse, np.float32(half_range) + np.float32(0.5)
    d = (high - low) / np.float32(top)
    inverse = ONE / d if d != ZERO else ZERO
    return d, low, inverse, np.float32(0.5)


@cache
def plain_encoder(half_range: int, top: int, block_bytes: int, at_low: int, at_high: int) -> Callable[..., None]:
    """Without importance: codes = trunc((x − low) / d + offset), nibbles at byte at_low, fifth bits at at_high.

    half_range: 8 or 16 for Q4_0 and Q5_0, 0 for the formats with a minimum. All are constants of the compiled code.
    """

    @njit(**OPTIONS)
    def encode(x, out):
        blocks = x.shape[1] // 32
        unknown = x.shape[1] // max(2 * blocks, 1)  # 16 too; the compiler vectorizes loops of known length differently
        run = 16 if half_range == 0 and top == 15 else unknown
        limit = np.float32(top)
        fifth = np.empty(32, np.uint32)
        for r in range(x.shape[0]):
            row, dst = x[r], out[r]
            for b in range(blocks):
                at, o = 32 * b, block_bytes * b
                d, low, inverse, offset = plain_scale(row, at, half_range, top)
                put_half(dst, o + D, to_half(d))
                if half_range == 0:
                    put_half(dst, o + M, to_half(low))
                o += at_low
                for i in range(run):
                    first = np.int32(min((row[at + i] - low) * inverse + offset, limit))
                    second = np.int32(min((row[at + run + i] - low) * inverse + offset, limit))
                    dst[o + i] = np.uint8((first & 15) | ((second & 15) << 4))
                    if top == 31:
                        fifth[i] = np.uint32(first >> 4)
                        fifth[run + i] = np.uint32(second >> 4)
                if top == 31:
                    o += at_high - at_low
                    word = np.uint32(0)
                    for i in range(32):
                        word |= fifth[i] << np.uint32(i)
                    for i in range(4):
                        dst[o + i] = np.uint8((word >> np.uint32(8 * i)) & np.uint32(255))

    return encode


@njit(**OPTIONS)
def encode_symmetric(x, importance, out, half_range, block_bytes, low, high):
    """Q4_0 (half_range 8) and Q5_0 (16) with importance: w = d · (q − half_range). low, high: facts of the planes."""
    acc = np.empty((3, 32), np.float32)
    codes, w = np.zeros(32, np.int32), np.empty(32, np.float32)
    for r in range(x.shape[0]):
        row = x[r]
        sigma2 = row_mean_square(row)
        for b in range(x.shape[1] // 32):
            at, dst = 32 * b, out[r, block_bytes * b : block_bytes * (b + 1)]
            block_weights(row, at, 32, importance, at, sigma2, w)
            d = symmetric_search(row, at, 32, w, half_range, codes, acc)
            put_half(dst, D, to_half(d))
            write_plane(codes, dst, *low)
            write_plane(codes, dst, *high)


@njit(**OPTIONS)
def encode_affine(x, importance, out, top, block_bytes, low, high):
    """Q4_1 (top 15) and Q5_1 (top 31) with importance: w = d · q + m; 16 blocks are searched at once."""
    fit, sums = np.empty(FIT, np.float32), np.empty(16, np.float32)
    lanes, codes = np.zeros(32 * 32, np.float32), np.zeros(32, np.int32)
    total = x.shape[1] // 32
    for r in range(x.shape[0]):
        row = x[r]
        sigma2 = row_mean_square(row)
        for b in range(total):
            at, dst, lane = 32 * b, out[r, block_bytes * b : block_bytes * (b + 1)], b % 16
            if lane == 0:
                count = min(16, total - b)
                load_lanes(row, at, 32, count, lanes)
                weight_lanes(row, at, 32, count, 0, importance, sigma2, lanes, sums)
                affine_search(lanes, 32, top, np.float32(-0.9), np.float32(0.05), 36, False, fit)
            affine_codes(lanes, 32, 1, lane, top, fit, codes)
            put_half(dst, D, to_half(fit[SCALE + lane]))
            put_half(dst, M, to_half(-fit[MINIMUM + lane]))
            write_plane(codes, dst, *low)
            write_plane(codes, dst, *high)


@njit(**OPTIONS)
def encode_q8_0(x, importance, weighted, out):
    """Q8_0: w = d · q with q rounded half away from zero; importance is not used."""
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 32):
            at, dst = 32 * b, out[r, B80 * b : B80 * (b + 1)]
            largest = ZERO
            for i in range(32):
                largest = max(largest, abs(row[at + i]))
            d = largest / np.float32(127)
            inverse = ONE / d if d != ZERO else ZERO
            put_half(dst, D, to_half(d))
            for i in range(32):
                v = row[at + i] * inverse
                whole = np.floor(abs(v))
                whole = whole + ONE if abs(v) - whole >= np.float32(0.5) else whole
                dst[Q8_CODES + i] = np.uint8(np.int8(whole if v >= ZERO else -whole))


def encode_q4_0(x, importance, weighted, out):
    """Q4_0."""
    if weighted:
        encode_symmetric(x, importance, out, 8, B40, P40, NONE)
    else:
        plain_encoder(8, 15, B40, P40[0], 0)(x, out)


def encode_q5_0(x, importance, weighted, out):
    """Q5_0."""
    if weighted:
        encode_symmetric(x, importance, out, 16, B50, P50, H50)
    else:
        plain_encoder(16, 31, B50, P50[0], H50[0])(x, out)


def encode_q4_1(x, importance, weighted, out):
    """Q4_1."""
    if weighted:
        encode_affine(x, importance, out, 15, B41, P41, NONE)
    else:
        plain_encoder(0, 15, B41, P41[0], 0)(x, out)


def encode_q5_1(x, importance, weighted, out):
    """Q5_1."""
    if weighted:
        encode_affine(x, importance, out, 31, B51, P51, H51)
    else:
        plain_encoder(0, 31, B51, P51[0], H51[0])(x, out)
