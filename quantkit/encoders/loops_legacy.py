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
    first_peak,
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


@njit(**OPTIONS)
def plain_codes(x, at, low, inverse, offset, top, codes):
    """codes = trunc((x − low) · inverse + offset), at most ``top``: ggml's search without importance."""
    for i in range(32):
        codes[i] = np.uint8(min((x[at + i] - low) * inverse + offset, top))


@njit(**OPTIONS)
def pack_32(codes, five, dst, o):
    """32 uint8 codes → [4 bytes of fifth bits] and 16 bytes of nibbles, the first half in the low ones."""
    if five:
        for b in range(4):
            bits = np.uint8(0)
            for i in range(8):
                bits |= ((codes[8 * b + i] >> 4) & 1) << i
            dst[o + b] = bits
        o += 4
    for i in range(16):
        dst[o + i] = np.uint8((codes[i] & np.uint8(15)) | np.uint8(codes[i + 16] << np.uint8(4)))


@njit(**OPTIONS)
def encode_symmetric(x, importance, weighted, out, half_range, block_bytes):
    """Q4_0 (half_range 8) and Q5_0 (16): w = d · (q − half_range)."""
    acc = np.empty((3, 32), np.float32)
    codes, w, small = np.zeros(32, np.int32), np.empty(32, np.float32), np.zeros(32, np.uint8)
    five = half_range == 16
    top = 2 * half_range - 1
    offset = np.float32(half_range) + np.float32(0.5)
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        sigma2 = row_mean_square(row) if weighted else ZERO
        for b in range(x.shape[1] // 32):
            at, o = 32 * b, block_bytes * b
            if weighted:
                block_weights(row, at, 32, importance, at, sigma2, w)
                d = symmetric_search(row, at, 32, w, half_range, codes, acc)
                for i in range(32):
                    small[i] = np.uint8(codes[i])
            else:
                d = first_peak(row, at, 32) / np.float32(-half_range)
                inverse = ONE / d if d != ZERO else ZERO
                plain_codes(row, at, ZERO, inverse, offset, np.float32(top), small)
            put_half(dst, o, to_half(d))
            pack_32(small, five, dst, o + 2)


@njit(**OPTIONS)
def encode_affine(x, importance, weighted, out, top, block_bytes):
    """Q4_1 (top 15) and Q5_1 (top 31): w = d · q + m. With importance, 16 blocks are searched at once."""
    fit, sums = np.empty(FIT, np.float32), np.empty(16, np.float32)
    lanes = np.zeros(32 * 32, np.float32)
    codes, small = np.zeros(32, np.int32), np.zeros(32, np.uint8)
    five = top == 31
    total = x.shape[1] // 32
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        sigma2 = row_mean_square(row) if weighted else ZERO
        for b in range(total):
            at, o, lane = 32 * b, block_bytes * b, b % 16
            if weighted:
                if lane == 0:
                    count = min(16, total - b)
                    load_lanes(row, at, 32, count, lanes)
                    weight_lanes(row, at, 32, count, 0, importance, sigma2, lanes, sums)
                    affine_search(lanes, 32, top, np.float32(-0.9), np.float32(0.05), 36, False, fit)
                affine_codes(lanes, 32, 1, lane, top, fit, codes)
                for i in range(32):
                    small[i] = np.uint8(codes[i])
                d, low = fit[SCALE + lane], -fit[MINIMUM + lane]
            else:
                low, high = extremes(row, at, 32)
                d = (high - low) / np.float32(top)
                inverse = ONE / d if d != ZERO else ZERO
                plain_codes(row, at, low, inverse, np.float32(0.5), np.float32(top), small)
            put_half(dst, o, to_half(d))
            put_half(dst, o + 2, to_half(low))
            pack_32(small, five, dst, o + 4)


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
    encode_symmetric(x, importance, weighted, out, 8, 18)


@njit(**OPTIONS)
def encode_q5_0(x, importance, weighted, out):
    """Q5_0."""
    encode_symmetric(x, importance, weighted, out, 16, 22)


@njit(**OPTIONS)
def encode_q4_1(x, importance, weighted, out):
    """Q4_1."""
    encode_affine(x, importance, weighted, out, 15, 20)


@njit(**OPTIONS)
def encode_q5_1(x, importance, weighted, out):
    """Q5_1."""
    encode_affine(x, importance, weighted, out, 31, 24)
