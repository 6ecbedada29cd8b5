"""Numba: ggml's encoders of IQ1_S and IQ1_M, to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c (quantize_row_iq1_s_impl, quantize_row_iq1_m_impl).
With three values the best split of the sorted weights is found by trying all; then every eight weights
move to the code book.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from quantkit.encoders.books import book
from quantkit.encoders.loops_scales import ONE, ZERO, clamp, mean_square, nearest
from quantkit.formats.iquants import IQ1_M, IQ1_S
from quantkit.formats.loops_bits import field_offset, pieces, put_half, store
from quantkit.formats.loops_half import OPTIONS, to_half

F32 = np.float32
HALF, LARGEST, TWO = F32(0.5), F32(3.4028234663852886e38), F32(2)
SHIFT = F32(IQ1_S.shift)
UP = np.array([-1, 0, 1], F32) + SHIFT  # the three values when the group is shifted up
DOWN = np.array([-1, 0, 1], F32) - SHIFT
S_BYTES, S_D, S_CODES = IQ1_S.block_bytes(), field_offset(IQ1_S, "d"), pieces(IQ1_S.codes, IQ1_S)
S_SCALES, S_SHIFTS = pieces(IQ1_S.scales, IQ1_S), pieces(IQ1_S.shifts, IQ1_S)
M_BYTES, M_HALF, M_CODES = IQ1_M.block_bytes(), pieces(IQ1_M.block_scale, IQ1_M), pieces(IQ1_M.codes, IQ1_M)  # type: ignore[arg-type]
M_SCALES, M_SHIFTS = pieces(IQ1_M.scales, IQ1_M), pieces(IQ1_M.shifts, IQ1_M)
S_LEAST, M_LEAST = F32(1e-12), F32(1e-7)
S_FUDGE, M_FUDGE = F32(1.125), F32(1.1125)


@njit(inline="always", **OPTIONS)
def importances(row, at, n, importance, weighted, sigma2, w):
    """Weights of the squared errors; returns the largest magnitude."""
    largest = ZERO
    for i in range(n):
        v = row[at + i]
        w[i] = importance[at + i] * np.sqrt(sigma2 + v * v) if weighted else v * v
        largest = max(largest, abs(v))
    return largest


@njit(inline="always", **OPTIONS)
def sort_order(row, at, n, order):
    """Positions of n weights in ascending order; equal ones keep theirs (as glibc's qsort does)."""
    for i in range(n):
        v, j = row[at + i], i
        while j > 0 and row[at + order[j - 1]] > v:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i


@njit(inline="always", **OPTIONS)
def split_levels(order, n, first, second, flip, levels):
    """Levels 0, 1, 2 of the sorted weights split at two places; flip swaps 0 and 2."""
    for j in range(n):
        level = 0 if j < first else 1 if j < second else 2
        levels[order[j]] = 2 - level if flip else level


@njit(inline="always", **OPTIONS)
def book_entry(row, at, w, wat, scale, values, levels, entries, index, start, neighbours):
    """Entry of the code book for eight levels, and whether they were on it."""
    point = 0
    for i in range(8):
        point |= levels[wat + i] << (2 * i)
    chosen = index[point]
    if chosen >= 0:
        return chosen, True
    best = LARGEST
    chosen = neighbours[start[point]]
    for n in range(start[point], start[point + 1]):
        entry, distance = neighbours[n], ZERO
        for i in range(8):
            diff = scale * values[(np.int32(entries[entry, i]) - 1) // 2] - row[at + i]
            distance += w[wat + i] * diff * diff
        if distance < best:
            best, chosen = distance, entry
    return chosen, False


@njit(inline="always", **OPTIONS)
def add_line(row, at, w, wat, entry, values, factor, entries, sums):
    """Add Σ w·q·x and Σ w·q² of eight weights to sums, in order."""
    for i in range(8):
        q = values[(np.int32(entries[entry, i]) - 1) // 2] * factor
        sums[0] += w[wat + i] * q * row[at + i]
        sums[1] += w[wat + i] * q * q


@njit(**OPTIONS)
def best_split_s(row, at, order, w, sums_x, sums_w):
    """(scale, first, second, +1 up or −1 down, 0 none) of 32 sorted weights."""
    sums_x[0] = ZERO
    sums_w[0] = ZERO
    for j in range(32):
        i = order[j]
        sums_x[j + 1] = sums_x[j] + w[i] * row[at + i]
        sums_w[j + 1] = sums_w[j] + w[i]
    best, scale, first, second, shift = -LARGEST, ZERO, -1, -1, 0
    for i1 in range(33):
        for i2 in range(i1, 33):
            x0, x1, x2 = sums_x[i1] - sums_x[0], sums_x[i2] - sums_x[i1], sums_x[32] - sums_x[i2]
            w0, w1, w2 = sums_w[i1] - sums_w[0], sums_w[i2] - sums_w[i1], sums_w[32] - sums_w[i2]
            qx = x0 * UP[0] + x1 * UP[1] + x2 * UP[2]
            q2 = w0 * UP[0] * UP[0] + w1 * UP[1] * UP[1] + w2 * UP[2] * UP[2]
            if q2 > ZERO and qx * qx > best * q2:
                scale = qx / q2
                best, first, second, shift = scale * qx, i1, i2, 1
            qx = x0 * DOWN[0] + x1 * DOWN[1] + x2 * DOWN[2]
            q2 = w0 * DOWN[0] * DOWN[0] + w1 * DOWN[1] * DOWN[1] + w2 * DOWN[2] * DOWN[2]
            if q2 > ZERO and qx * qx > best * q2:
                scale = qx / q2
                best, first, second, shift = scale * qx, i1, i2, -1
    return scale, first, second, shift


@njit(**OPTIONS)
def loop_iq1_s(x, importance, weighted, out, entries, index, start, neighbours):
    """IQ1_S: 8 groups of 32 weights, one shift each."""
    w, order, levels = np.empty(32, F32), np.zeros(32, np.int32), np.zeros(32, np.int32)
    sums_x, sums_w, sums = np.empty(33, F32), np.empty(33, F32), np.empty(2, F32)
    scales, shifts, chosen = np.empty(8, F32), np.zeros(8, np.int32), np.zeros(4, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 256):
            at, dst = 256 * b, out[r, S_BYTES * b : S_BYTES * (b + 1)]
            dst[:] = 0
            sigma2, largest = TWO * mean_square(row, at, 256), ZERO
            for g in range(8):
                s0 = at + 32 * g
                scales[g] = ZERO
                shifts[g] = 1
                if importances(row, s0, 32, importance, weighted, sigma2, w) < S_LEAST:
                    continue
                sort_order(row, s0, 32, order)
                scale, first, second, shift = best_split_s(row, s0, order, w, sums_x, sums_w)
                if shift == 0:
                    continue
                flip = scale < ZERO
                split_levels(order, 32, first, second, flip, levels)
                scale = abs(scale)
                shift = -shift if flip else shift
                values = UP if shift == 1 else DOWN
                exact = True
                for k in range(4):
                    entry, on = book_entry(row, s0 + 8 * k, w, 8 * k, scale, values, levels, entries, index, start, neighbours)
                    chosen[k] = entry
                    exact = exact and on
                if not exact:
                    sums[:] = ZERO
                    for k in range(4):
                        add_line(row, s0 + 8 * k, w, 8 * k, chosen[k], values, ONE, entries, sums)
                    if sums[0] > ZERO and sums[1] > ZERO:
                        scale = sums[0] / sums[1]
                for k in range(4):
                    store(dst, S_CODES, 4 * g + k, chosen[k])
                scales[g] = scale
                shifts[g] = shift
                largest = max(largest, scale)
            if largest == ZERO:
                continue
            d = largest / F32(15)
            put_half(dst, S_D, to_half(d * S_FUDGE))
            for g in range(8):
                store(dst, S_SCALES, g, clamp(nearest(HALF * (ONE / d * scales[g] - ONE)), 0, 7))
                store(dst, S_SHIFTS, g, 1 if shifts[g] == -1 else 0)


@njit(**OPTIONS)
def best_split_m(row, at, order, w, px, pw):
    """(scale, first, second, shifts) of 16 sorted weights; bit 1 of shifts: first half down, bit 0: second half."""
    px[:, 0] = ZERO
    pw[:, 0] = ZERO
    for j in range(16):
        i = order[j]
        h = 0 if i < 8 else 1
        px[h, j + 1] = px[h, j] + w[i] * row[at + i]
        px[1 - h, j + 1] = px[1 - h, j]
        pw[h, j + 1] = pw[h, j] + w[i]
        pw[1 - h, j + 1] = pw[1 - h, j]
    up1, up2 = UP[0] * UP[0] - UP[1] * UP[1], UP[1] * UP[1] - UP[2] * UP[2]
    down1, down2 = DOWN[0] * DOWN[0] - DOWN[1] * DOWN[1], DOWN[1] * DOWN[1] - DOWN[2] * DOWN[2]
    best, scale, first, second, chosen = -LARGEST, ZERO, -1, -1, -1
    for i1 in range(17):
        for i2 in range(i1, 17):
            a, c = px[0, i1] + px[0, i2], px[1, i1] + px[1, i2]
            xu0, xd0 = px[0, 16] * UP[2] - a, px[0, 16] * DOWN[2] - a
            xu1, xd1 = px[1, 16] * UP[2] - c, px[1, 16] * DOWN[2] - c
            wu0 = pw[0, 16] * UP[2] * UP[2] + pw[0, i1] * up1 + pw[0, i2] * up2
            wd0 = pw[0, 16] * DOWN[2] * DOWN[2] + pw[0, i1] * down1 + pw[0, i2] * down2
            wu1 = pw[1, 16] * UP[2] * UP[2] + pw[1, i1] * up1 + pw[1, i2] * up2
            wd1 = pw[1, 16] * DOWN[2] * DOWN[2] + pw[1, i1] * down1 + pw[1, i2] * down2
            for k in range(4):
                qx = (xu0 if k < 2 else xd0) + (xu1 if k % 2 == 0 else xd1)
                q2 = (wu0 if k < 2 else wd0) + (wu1 if k % 2 == 0 else wd1)
                if q2 > ZERO and qx * qx > best * q2:
                    scale = qx / q2
                    best, first, second, chosen = scale * qx, i1, i2, k
    return scale, first, second, chosen


@njit(inline="always", **OPTIONS)
def half_values(shifts, k):
    """The three values of the first (k = 0) or second eight of a group."""
    return DOWN if (shifts >> (1 - k)) & 1 else UP


@njit(**OPTIONS)
def loop_iq1_m(x, importance, weighted, out, entries, index, start, neighbours):
    """IQ1_M: 16 groups of 16 weights, a shift for each half; the block's scale is fitted last."""
    w, order, levels = np.empty(16, F32), np.zeros(16, np.int32), np.zeros(16, np.int32)
    px, pw, sums = np.empty((2, 17), F32), np.empty((2, 17), F32), np.empty(2, F32)
    scales, shifts, chosen = np.empty(16, F32), np.zeros(16, np.int32), np.zeros(32, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 256):
            at, dst = 256 * b, out[r, M_BYTES * b : M_BYTES * (b + 1)]
            dst[:] = 0
            sigma2, largest = TWO * mean_square(row, at, 256), ZERO
            for g in range(16):
                s0 = at + 16 * g
                scales[g] = ZERO
                shifts[g] = 0
                chosen[2 * g : 2 * g + 2] = 0
                if importances(row, s0, 16, importance, weighted, sigma2, w) < M_LEAST:
                    continue
                sort_order(row, s0, 16, order)
                scale, first, second, shift = best_split_m(row, s0, order, w, px, pw)
                if shift < 0:
                    continue
                flip = scale < ZERO
                split_levels(order, 16, first, second, flip, levels)
                scale = abs(scale)
                shift = 3 - shift if flip else shift
                exact = True
                for k in range(2):
                    entry, on = book_entry(
                        row, s0 + 8 * k, w, 8 * k, scale, half_values(shift, k), levels, entries, index, start, neighbours
                    )
                    chosen[2 * g + k] = entry
                    exact = exact and on
                if not exact:
                    sums[:] = ZERO
                    for k in range(2):
                        add_line(row, s0 + 8 * k, w, 8 * k, chosen[2 * g + k], half_values(shift, k), ONE, entries, sums)
                    if sums[0] > ZERO and sums[1] > ZERO:
                        scale = sums[0] / sums[1]
                for k in range(2):
                    store(dst, M_CODES, 2 * g + k, chosen[2 * g + k])
                scales[g] = scale
                shifts[g] = shift
                largest = max(largest, scale)
            if largest == ZERO:
                continue
            d = largest / F32(15)
            inverse = ONE / d
            sums[:] = ZERO
            for g in range(16):
                code = clamp(nearest(HALF * (inverse * scales[g] - ONE)), 0, 7)
                store(dst, M_SCALES, g, code)
                importances(row, at + 16 * g, 16, importance, weighted, sigma2, w)
                for k in range(2):
                    store(dst, M_SHIFTS, 2 * g + k, (shifts[g] >> (1 - k)) & 1)
                    values = half_values(shifts[g], k)
                    add_line(row, at + 16 * g + 8 * k, w, 8 * k, chosen[2 * g + k], values, F32(2 * code + 1), entries, sums)
            if sums[1] > ZERO:
                d = sums[0] / sums[1]
            bits = np.int32(to_half(d * M_FUDGE))
            for k in range(4):
                store(dst, M_HALF, k, (bits >> (4 * k)) & 15)


def make_encoder(name: str) -> Callable[[np.ndarray, np.ndarray, bool, np.ndarray], None]:
    """The encoder of IQ1_S or IQ1_M: (x, importance, weighted, out) as in loops_kquants."""
    entries, index, start, neighbours = book("iq1")
    loop = loop_iq1_s if name == "IQ1_S" else loop_iq1_m

    def encode(x, importance, weighted, out):
        loop(x, importance, weighted, out, entries, index, start, neighbours)

    return encode
