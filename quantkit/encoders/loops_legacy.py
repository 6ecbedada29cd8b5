"""Numba: ggml's 32-weight encoders (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c. Signatures as in loops_kquants.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.encoders.loops_kquants import block_weights, put_half, weight_lanes
from quantkit.encoders.loops_scales import (
    FIT,
    MINIMUM,
    ONE,
    OPTIONS,
    SCALE,
    ZERO,
    affine_codes,
    affine_search,
    extremes,
    first_of,
    load_lanes,
    symmetric_search,
    to_half,
)


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


@njit(**OPTIONS)
def encode_plain_4(x, out, half_range):
    """Q4_0 (half_range 8) and Q4_1 (0) without importance: codes = trunc((x − low) / d + offset)."""
    header = 2 if half_range > 0 else 4
    fifteen = np.float32(15)
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        for b in range(x.shape[1] // 32):
            at, o = 32 * b, (header + 16) * b
            d, low, inverse, offset = plain_scale(row, at, half_range, 15)
            put_half(dst, o, to_half(d))
            if half_range == 0:
                put_half(dst, o + 2, to_half(low))
            o += header
            for i in range(16):
                first = np.int32(min((row[at + i] - low) * inverse + offset, fifteen))
                second = np.int32(min((row[at + 16 + i] - low) * inverse + offset, fifteen))
                dst[o + i] = np.uint8(first | (second << 4))


@njit(**OPTIONS)
def encode_plain_5(x, out, half_range):
    """Q5_0 (half_range 16) and Q5_1 (0) without importance; the fifth bits go before the nibbles."""
    header = 2 if half_range > 0 else 4
    top = np.float32(31)
    codes = np.empty(32, np.int32)
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        for b in range(x.shape[1] // 32):
            at, o = 32 * b, (header + 20) * b
            d, low, inverse, offset = plain_scale(row, at, half_range, 31)
            put_half(dst, o, to_half(d))
            if half_range == 0:
                put_half(dst, o + 2, to_half(low))
            o += header
            for i in range(32):
                codes[i] = np.int32(min((row[at + i] - low) * inverse + offset, top))
            word = np.uint32(0)
            for i in range(32):
                word |= np.uint32(codes[i] >> 4) << np.uint32(i)
            for i in range(4):
                dst[o + i] = np.uint8((word >> np.uint32(8 * i)) & np.uint32(255))
            for i in range(16):
                dst[o + 4 + i] = np.uint8((codes[i] & 15) | ((codes[16 + i] & 15) << 4))


@njit(**OPTIONS)
def pack_32(codes, five, dst, o):
    """32 codes → [4 bytes of fifth bits] and 16 bytes of nibbles, the first half in the low ones."""
    if five:
        for b in range(4):
            bits = 0
            for i in range(8):
                bits |= ((codes[8 * b + i] >> 4) & 1) << i
            dst[o + b] = np.uint8(bits)
        o += 4
    for i in range(16):
        dst[o + i] = np.uint8((codes[i] & 15) | ((codes[i + 16] & 15) << 4))


@njit(**OPTIONS)
def encode_symmetric(x, importance, out, half_range, block_bytes):
    """Q4_0 (half_range 8) and Q5_0 (16) with importance: w = d · (q − half_range)."""
    acc = np.empty((3, 32), np.float32)
    codes, w = np.zeros(32, np.int32), np.empty(32, np.float32)
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        sigma2 = row_mean_square(row)
        for b in range(x.shape[1] // 32):
            at, o = 32 * b, block_bytes * b
            block_weights(row, at, 32, importance, at, sigma2, w)
            d = symmetric_search(row, at, 32, w, half_range, codes, acc)
            put_half(dst, o, to_half(d))
            pack_32(codes, half_range == 16, dst, o + 2)


@njit(**OPTIONS)
def encode_affine(x, importance, out, top, block_bytes):
    """Q4_1 (top 15) and Q5_1 (top 31) with importance: w = d · q + m; 16 blocks are searched at once."""
    fit, sums = np.empty(FIT, np.float32), np.empty(16, np.float32)
    lanes, codes = np.zeros(32 * 32, np.float32), np.zeros(32, np.int32)
    total = x.shape[1] // 32
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        sigma2 = row_mean_square(row)
        for b in range(total):
            at, o, lane = 32 * b, block_bytes * b, b % 16
            if lane == 0:
                count = min(16, total - b)
                load_lanes(row, at, 32, count, lanes)
                weight_lanes(row, at, 32, count, 0, importance, sigma2, lanes, sums)
                affine_search(lanes, 32, top, np.float32(-0.9), np.float32(0.05), 36, False, fit)
            affine_codes(lanes, 32, 1, lane, top, fit, codes)
            put_half(dst, o, to_half(fit[SCALE + lane]))
            put_half(dst, o + 2, to_half(-fit[MINIMUM + lane]))
            pack_32(codes, top == 31, dst, o + 4)


@njit(**OPTIONS)
def encode_q8_0(x, importance, weighted, out):
    """Q8_0: w = d · q with q rounded half away from zero; importance is not used."""
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        for b in range(x.shape[1] // 32):
            at, o = 32 * b, 34 * b
            largest = ZERO
            for i in range(32):
                largest = max(largest, abs(row[at + i]))
            d = largest / np.float32(127)
            inverse = ONE / d if d != ZERO else ZERO
            put_half(dst, o, to_half(d))
            for i in range(32):
                v = row[at + i] * inverse
                whole = np.floor(abs(v))
                whole = whole + ONE if abs(v) - whole >= np.float32(0.5) else whole
                dst[o + 2 + i] = np.uint8(np.int8(whole if v >= ZERO else -whole))


@njit(**OPTIONS)
def encode_q4_0(x, importance, weighted, out):
    """Q4_0."""
    if weighted:
        encode_symmetric(x, importance, out, 8, 18)
    else:
        encode_plain_4(x, out, 8)


@njit(**OPTIONS)
def encode_q5_0(x, importance, weighted, out):
    """Q5_0."""
    if weighted:
        encode_symmetric(x, importance, out, 16, 22)
    else:
        encode_plain_5(x, out, 16)


@njit(**OPTIONS)
def encode_q4_1(x, importance, weighted, out):
    """Q4_1."""
    if weighted:
        encode_affine(x, importance, out, 15, 20)
    else:
        encode_plain_4(x, out, 0)


@njit(**OPTIONS)
def encode_q5_1(x, importance, weighted, out):
    """Q5_1."""
    if weighted:
        encode_affine(x, importance, out, 31, 24)
    else:
        encode_plain_5(x, out, 0)
