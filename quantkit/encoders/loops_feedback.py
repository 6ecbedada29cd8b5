"""Numba: rounding with error feedback, codes on fixed scales.

The rows of a weight do not depend on each other, so they are the lanes where a code is one weight: every step
works on LANES rows. Code books take one row at a time. A call rounds one block of columns; the caller carries the
errors on to later blocks by a matrix product, which is many times faster than doing so column by column.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.formats.loops_half import OPTIONS

F32 = np.float32
ZERO = F32(0)
LANES = 32
FUSED = {**OPTIONS, "fastmath": {"contract"}}  # multiply and add in one step: nothing here must equal C to the bit


@njit(**OPTIONS)
def nearest_codes(x, linear, low, high, zero, middles, codes):
    """codes[i] = number of the value nearest to x[i]: a rounded integer, or a place on a ladder of values."""
    if linear:
        for i in range(x.shape[0]):
            codes[i] = np.int32(min(max(np.rint(x[i] + zero), low), high))
    else:
        for i in range(x.shape[0]):
            place = np.int32(0)
            for k in range(middles.shape[0]):
                place += 1 if x[i] >= middles[k] else 0
            codes[i] = place


@njit(**FUSED)
def feedback(w, first, last, upper, scale, minimum, group, linear, low, high, zero, values, middles, codes, errors):
    """GPTQ's sweep over columns first … last of LANES rows (arXiv 2210.17323, with fixed scales).

    w: float32 (columns, LANES) in the order of the sweep, changed on the way; upper: float32 (columns, columns),
    the upper Cholesky factor of the inverse second moments, in that order; scale, minimum: float32 (groups, LANES);
    group: int64 (columns,), the group of each column; values: what each code stands for; codes: int32
    (columns, LANES), written; errors: float32 (last - first, LANES), written: later columns need w -= upperᵀ · errors.
    """
    x = np.empty(LANES, F32)
    for j in range(first, last):
        s, m, row, chosen, error = scale[group[j]], minimum[group[j]], w[j], codes[j], errors[j - first]
        for i in range(LANES):
            x[i] = (row[i] - m[i]) / s[i] if s[i] != ZERO else ZERO
        nearest_codes(x, linear, low, high, zero, middles, chosen)
        inverse = F32(1) / upper[j, j]
        for i in range(LANES):
            error[i] = (row[i] - (s[i] * values[chosen[i]] + m[i])) * inverse
        for k in range(j + 1, last):
            u, later = upper[j, k], w[k]
            for i in range(LANES):
                later[i] -= u * error[i]


@njit(inline="always", **OPTIONS)
def split_signs(x, at, weight, even, magnitude):
    """Magnitudes of eight weights and their sign byte. even: an odd number of minus signs flips the cheapest one."""
    byte, flips, cheapest, least = 0, 0, 0, F32(np.inf)
    for i in range(8):
        v = x[at + i]
        magnitude[i] = abs(v)
        if v < ZERO:
            byte |= 1 << i
            flips += 1
        cost = weight[i] * v * v
        if cost < least:
            least, cheapest = cost, i
    if even and flips % 2:
        magnitude[cheapest] = -magnitude[cheapest]
        byte ^= 1 << cheapest
    return byte


@njit(inline="always", **OPTIONS)
def nearest_entry(x, at, width, weight, scale, shift, middles, bits, book, index, start, neighbours):
    """The row of the code book nearest to x[at : at+width] / scale − shift: the rounded point, or its best neighbour."""
    point = 0
    for i in range(width):
        v, level = x[at + i] / scale - shift, 0
        for k in range(middles.shape[0]):
            level += 1 if v >= middles[k] else 0
        point |= level << (bits * i)
    if index[point] >= 0:
        return index[point]
    best, chosen = F32(np.inf), neighbours[start[point]]
    for n in range(start[point], start[point + 1]):
        distance = ZERO
        for i in range(width):
            diff = scale * (F32(book[neighbours[n], i]) + shift) - x[at + i]
            distance += weight[at + i] * diff * diff
        if distance < best:
            best, chosen = distance, neighbours[n]
    return chosen


@njit(**FUSED)
def feedback_book(
    w, first, last, upper, order, weights, scale, shift, size, width, bits, signed, even, middles, book, index, start, neighbours,
    codes, signs, errors,
):  # fmt: skip
    """The sweep for code books: eight columns of a row at a time, chosen together, their errors carried onward.

    w: float32 (rows, columns) in the order of the sweep, changed on the way; order: int64 (columns / 8,) eights in that
    order; weights: float32 (columns,), in that order; scale: float32 (rows, columns / size); shift: float32 (rows,
    columns / 8); codes: int32 (rows, columns / width) and signs: int32 (rows, columns / 8) hold ggml's and are
    overwritten; errors: float32 (rows, last - first), written: later columns need w -= errors · upper.
    """
    x = np.empty(8, F32)
    for r in range(w.shape[0]):
        row = w[r]
        for p in range(first // 8, last // 8):
            eight, at = order[p], 8 * p
            s, up, e = scale[r, 8 * eight // size], shift[r, eight], errors[r, at - first : at - first + 8]
            if s != ZERO:
                byte = split_signs(row, at, weights[at : at + 8], even, x) if signed else 0
                if not signed:
                    for i in range(8):
                        x[i] = row[at + i]
                for h in range(8 // width):
                    entry = nearest_entry(
                        x, h * width, width, weights[at : at + 8], s, up, middles, bits, book, index, start, neighbours
                    )
                    codes[r, eight * (8 // width) + h] = entry
                    for i in range(h * width, (h + 1) * width):
                        q = s * (F32(book[entry, i - h * width]) + up)
                        e[i] = row[at + i] - (-q if (byte >> i) & 1 else q)
                signs[r, eight] = byte
            else:
                for i in range(8):
                    e[i] = row[at + i]
            for i in range(8):  # e · U = error, within the eight
                for k in range(i):
                    e[i] -= e[k] * upper[at + k, at + i]
                e[i] /= upper[at + i, at + i]
            later = row[at + 8 : last]  # slices, as bounds keep Numba's test for negative indices in the inner loop
            for i in range(0, 8, 4):
                e0, e1, e2, e3 = e[i], e[i + 1], e[i + 2], e[i + 3]
                u0, u1 = upper[at + i, at + 8 : last], upper[at + i + 1, at + 8 : last]
                u2, u3 = upper[at + i + 2, at + 8 : last], upper[at + i + 3, at + 8 : last]
                for k in range(later.shape[0]):
                    later[k] -= e0 * u0[k] + e1 * u1[k] + e2 * u2[k] + e3 * u3[k]
