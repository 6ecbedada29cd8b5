"""Numba: ggml's K-quant encoders, row by row, to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c (quantize_row_q2_K … q6_K, with and without importance).
Every encoder has the signature (x, importance, weighted, out): float32 rows (r, n), float32 (n,)
importance of the columns, whether to use it, and uint8 rows (r, bytes) that are written.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.encoders.loops_scales import (
    FIT,
    MINIMUM,
    Q3_ROWS,
    SCALE,
    TINY,
    ZERO,
    affine_codes,
    affine_search,
    clamp,
    load_lanes,
    mean_square,
    nearest,
    positive_search,
    q3_search,
    symmetric_search,
)
from quantkit.formats.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from quantkit.formats.loops_bits import field_offset, pieces, plane_facts, put_half, store, store_all, write_plane
from quantkit.formats.loops_half import OPTIONS, from_half, to_half

Q2_BYTES, Q2_D, Q2_MIN = Q2_K.block_bytes(), field_offset(Q2_K, "d"), field_offset(Q2_K, "dmin")
Q3_BYTES, Q3_D, Q6_BYTES, Q6_D = Q3_K.block_bytes(), field_offset(Q3_K, "d"), Q6_K.block_bytes(), field_offset(Q6_K, "d")
Q4_BYTES, Q5_BYTES, Q4_D, Q4_MIN = Q4_K.block_bytes(), Q5_K.block_bytes(), field_offset(Q4_K, "d"), field_offset(Q4_K, "dmin")
(Q2_CODES, _), (Q3_LOW, Q3_HIGH), (Q4_CODES, _) = plane_facts(Q2_K), plane_facts(Q3_K), plane_facts(Q4_K)
(Q5_LOW, Q5_HIGH), (Q6_LOW, Q6_HIGH) = plane_facts(Q5_K), plane_facts(Q6_K)
Q2_SCALES, Q2_MINS, Q3_SCALES, Q6_SCALES = (
    pieces(p, f) for p, f in ((Q2_K.scales, Q2_K), (Q2_K.minimums, Q2_K), (Q3_K.scales, Q3_K), (Q6_K.scales, Q6_K))
)
K4_SCALES, K4_MINS = pieces(Q4_K.scales, Q4_K), pieces(Q4_K.minimums, Q4_K)


@njit(**OPTIONS)
def recode_affine(x, at, n, d, m, top, codes, c):
    """codes[c:c+n] = nearest code of x with the stored scale d and minimum m; untouched if d is 0."""
    if d != ZERO:
        for i in range(n):
            codes[c + i] = clamp(nearest((x[at + i] + m) / d), 0, top)


@njit(**OPTIONS)
def block_weights(x, at, n, importance, column, sigma2, w):
    """w = importance · sqrt(σ² + x²); returns their sum in order."""
    for i in range(n):
        v = x[at + i]
        w[i] = importance[column + i] * np.sqrt(sigma2 + v * v)
    total = ZERO
    for i in range(n):
        total += w[i]
    return total


@njit(**OPTIONS)
def plain_scales(values, n, top, codes):
    """Unweighted scale of scales: codes = round(values · top / max). Returns max / top as float32."""
    largest = ZERO
    for j in range(n):
        if values[j] > largest:
            largest = values[j]
    inverse = np.float32(top) / largest if largest > ZERO else ZERO
    for j in range(n):
        codes[j] = min(np.int32(top), nearest(inverse * values[j]))
    return largest / np.float32(top)


@njit(**OPTIONS)
def weight_lanes(row, at, n, count, first, importance, sigma2, lanes, sums):
    """Weights of ``count`` sub-blocks into lanes from ``first`` on: importance · sqrt(σ² + x²), and their sums."""
    for g in range(count):
        total = ZERO
        for i in range(n):
            v = row[at + n * g + i]
            w = importance[at + n * g + i] * np.sqrt(sigma2 + v * v)
            lanes[32 * i + 16 + first + g] = w
            total += w
        sums[first + g] = total


@njit(**OPTIONS)
def encode_q2_k(x, importance, weighted, out):
    """Q2_K: 16 sub-blocks of 16 with scale and minimum."""
    acc, fit, lanes = np.empty((3, 32), np.float32), np.empty(FIT, np.float32), np.zeros(32 * 16, np.float32)
    codes = np.zeros(256, np.int32)
    sums = np.empty(16, np.float32)
    sc, mn = np.empty(16, np.int32), np.empty(16, np.int32)
    scales, mins = fit[SCALE : SCALE + 16], fit[MINIMUM : MINIMUM + 16]
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 256):
            at, dst = 256 * b, out[r, Q2_BYTES * b : Q2_BYTES * (b + 1)]
            load_lanes(row, at, 16, 16, lanes)
            if weighted:
                weight_lanes(row, at, 16, 16, 0, importance, mean_square(row, at, 256), lanes, sums)
                affine_search(lanes, 16, 3, np.float32(-0.9), np.float32(0.05), 36, False, fit)
                d = to_half(positive_search(scales, 16, 15, sums, sc, acc))
                m = to_half(positive_search(mins, 16, 15, sums, mn, acc))
            else:
                for i in range(16):
                    for g in range(16):
                        lanes[32 * i + 16 + g] = abs(lanes[32 * i + g])
                affine_search(lanes, 16, 3, np.float32(-0.5), np.float32(0.1), 15, True, fit)
                d = to_half(plain_scales(scales, 16, 15, sc))
                m = to_half(plain_scales(mins, 16, 15, mn))
            affine_codes(lanes, 16, 16, 0, 3, fit, codes)
            fd, fm = from_half(d), from_half(m)
            for j in range(16):
                recode_affine(row, at + 16 * j, 16, fd * np.float32(sc[j]), fm * np.float32(mn[j]), 3, codes, 16 * j)
            dst[:] = 0
            store_all(dst, Q2_SCALES, sc)
            store_all(dst, Q2_MINS, mn)
            write_plane(codes, dst, *Q2_CODES)
            put_half(dst, Q2_D, d)
            put_half(dst, Q2_MIN, m)


@njit(**OPTIONS)
def q3_block_scale(row, at, importance, weighted, codes, scales, sc, w, sums, acc, lanes):
    """Sub-block scales, their 6-bit codes (32 added) and the half scale of one Q3_K super-block."""
    if weighted:
        sigma2 = np.float32(2) * mean_square(row, at, 256)
        for j in range(16):
            s = at + 16 * j
            sums[j] = block_weights(row, s, 16, importance, s, sigma2, w)
            scales[j] = symmetric_search(row, s, 16, w, 4, codes[16 * j : 16 * j + 16], acc)
        return to_half(symmetric_search(scales, 0, 16, sums, 32, sc, acc))
    q3_search(row, at, scales, codes, lanes)
    largest, peak = ZERO, ZERO
    for j in range(16):
        if abs(scales[j]) > largest:
            largest, peak = abs(scales[j]), scales[j]
    if peak == ZERO:
        sc[:16] = 0  # as ggml leaves them: all bytes zero
        return to_half(ZERO)
    inverse = np.float32(-32) / peak
    for j in range(16):
        sc[j] = clamp(nearest(inverse * scales[j]), -32, 31) + 32
    return to_half(np.float32(1) / inverse)


@njit(**OPTIONS)
def encode_q3_k(x, importance, weighted, out):
    """Q3_K: 16 sub-blocks of 16 with a signed scale; high bits in a plane of their own."""
    acc = np.empty((3, 32), np.float32)
    lanes = np.empty(Q3_ROWS, np.float32)
    codes = np.zeros(256, np.int32)
    w, sums, scales = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    sc = np.empty(16, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 256):
            at, dst = 256 * b, out[r, Q3_BYTES * b : Q3_BYTES * (b + 1)]
            d = q3_block_scale(row, at, importance, weighted, codes, scales, sc, w, sums, acc, lanes)
            fd = from_half(d)
            for j in range(16):
                scale = fd * np.float32(sc[j] - 32)
                if scale != ZERO:
                    for i in range(16 * j, 16 * j + 16):
                        codes[i] = clamp(nearest(row[at + i] / scale), -4, 3) + 4
            dst[:] = 0
            store_all(dst, Q3_SCALES, sc)
            write_plane(codes, dst, *Q3_LOW)
            write_plane(codes, dst, *Q3_HIGH)
            put_half(dst, Q3_D, d)


@njit(**OPTIONS)
def k4_pair(row, at, blocks, importance, weighted, top, rmin, rdelta, steps, sums, lanes, fit):
    """Search the sub-blocks of one or two super-blocks of Q4_K or Q5_K: 16 lanes of 32 weights."""
    load_lanes(row, at, 32, 8 * blocks, lanes)
    if weighted:
        for b in range(blocks):
            start = at + 256 * b
            sigma2 = np.float32(2) * mean_square(row, start, 256)
            weight_lanes(row, start, 32, 8, 8 * b, importance, sigma2, lanes, sums)
        affine_search(lanes, 32, top, np.float32(-0.9), np.float32(0.05), 36, False, fit)
        return
    for g in range(8 * blocks):
        level = np.sqrt(mean_square(row, at + 32 * g, 32))
        for i in range(32):
            lanes[32 * i + 16 + g] = level + abs(lanes[32 * i + g])
    affine_search(lanes, 32, top, rmin, rdelta, steps, False, fit)


@njit(**OPTIONS)
def k4_block(row, at, first, weighted, top, sums, lanes, fit, acc, codes, sc, mn):
    """Block scales and final codes of one super-block whose sub-blocks lie in lanes first … first+7."""
    scales, mins = fit[SCALE + first : SCALE + first + 8], fit[MINIMUM + first : MINIMUM + first + 8]
    if weighted:
        d = to_half(positive_search(scales, 8, 63, sums[first:], sc, acc))
        m = to_half(positive_search(mins, 8, 63, sums[first:], mn, acc))
    else:
        d = to_half(plain_scales(scales, 8, 63, sc))
        m = to_half(plain_scales(mins, 8, 63, mn))
    affine_codes(lanes, 32, 8, first, top, fit, codes)
    fd, fm = from_half(d), from_half(m)
    for j in range(8):
        recode_affine(row, at + 32 * j, 32, fd * np.float32(sc[j]), fm * np.float32(mn[j]), top, codes, 32 * j)
    return d, m


@njit(**OPTIONS)
def encode_k4(x, importance, weighted, out, top, rmin, rdelta, steps):
    """Q4_K (top 15) and Q5_K (top 31): 8 sub-blocks of 32; fifth bits in planes of their own."""
    acc, fit, lanes = np.empty((3, 32), np.float32), np.empty(FIT, np.float32), np.zeros(32 * 32, np.float32)
    sums, codes = np.empty(16, np.float32), np.zeros(256, np.int32)
    sc, mn = np.empty(8, np.int32), np.empty(8, np.int32)
    total = x.shape[1] // 256
    block_bytes = Q4_BYTES if top == 15 else Q5_BYTES
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(total):
            if b % 2 == 0:
                pair = min(2, total - b)
                k4_pair(row, 256 * b, pair, importance, weighted, top, rmin, rdelta, steps, sums, lanes, fit)
            d, m = k4_block(row, 256 * b, 8 * (b % 2), weighted, top, sums, lanes, fit, acc, codes, sc, mn)
            dst = out[r, block_bytes * b : block_bytes * (b + 1)]
            dst[:] = 0
            put_half(dst, Q4_D, d)
            put_half(dst, Q4_MIN, m)
            store_all(dst, K4_SCALES, sc)
            store_all(dst, K4_MINS, mn)
            if top == 31:
                write_plane(codes, dst, *Q5_LOW)
                write_plane(codes, dst, *Q5_HIGH)
            else:
                write_plane(codes, dst, *Q4_CODES)


def encode_q4_k(x, importance, weighted, out):
    """Q4_K."""
    encode_k4(x, importance, weighted, out, 15, np.float32(-1), np.float32(0.1), 20)


def encode_q5_k(x, importance, weighted, out):
    """Q5_K."""
    encode_k4(x, importance, weighted, out, 31, np.float32(-0.5), np.float32(0.1), 15)


@njit(**OPTIONS)
def encode_q6_k(x, importance, weighted, out):
    """Q6_K: 16 sub-blocks of 16 with signed 8-bit scales; weights are the importance itself."""
    acc = np.empty((3, 32), np.float32)
    codes = np.zeros(256, np.int32)
    w, scales = np.empty(16, np.float32), np.empty(16, np.float32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 256):
            at, dst = 256 * b, out[r, Q6_BYTES * b : Q6_BYTES * (b + 1)]
            dst[:] = 0
            largest, peak = ZERO, ZERO
            for j in range(16):
                s = at + 16 * j
                for i in range(16):
                    w[i] = importance[s + i] if weighted else row[s + i] * row[s + i]
                scale = symmetric_search(row, s, 16, w, 32, codes[16 * j : 16 * j + 16], acc)
                scales[j] = scale
                if abs(scale) > largest:
                    largest, peak = abs(scale), scale
            if largest < TINY:
                continue
            inverse = np.float32(-128) / peak
            d = to_half(np.float32(1) / inverse)
            fd = from_half(d)
            for j in range(16):
                sc = np.int8(min(np.int32(127), nearest(inverse * scales[j])))
                store(dst, Q6_SCALES, j, np.int32(sc) & 255)
                step = fd * np.float32(sc)
                if step != ZERO:
                    for i in range(16 * j, 16 * j + 16):
                        codes[i] = clamp(nearest(row[at + i] / step), -32, 31) + 32
            write_plane(codes, dst, *Q6_LOW)
            write_plane(codes, dst, *Q6_HIGH)
            put_half(dst, Q6_D, d)
