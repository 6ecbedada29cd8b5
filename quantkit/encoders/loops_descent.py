"""Numba: descent on the numbers of packed rows in a quadratic metric.

The loss is ½ tr(O Δ I Δᵀ) for the error Δ of a matrix, with I over its columns and O over its rows. Rows are changed
one after the other, a block of columns at a time; every change is accepted only if it lowers the loss, and the
gradient of the row is kept up to date. What a row's change does to later rows of the panel is added here, what it
does outside by the caller's matrix products.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.encoders.loops_feedback import FUSED, nearest_entry, split_signs
from quantkit.formats.loops_half import from_half, to_half

F32 = np.float32
ZERO, HALF, ONE = F32(0), F32(0.5), F32(1)


@njit(inline="always", **FUSED)
def add_move(r, row, size):
    """Gradient after a weight moved: ``row`` of the inner metric times ``size``."""
    for k in range(r.shape[0]):
        r[k] += size * row[k]


@njit(**FUSED)
def quadratic(a, inner, low, high, image):
    """aᵀ · inner · a over columns low … high. image: scratch; sums of rows, four at a time, because those are vectors.

    Slices and loops from zero: bounds that are arguments keep Numba's test for negative indices in the inner loop.
    """
    x, out = a[low:high], image[low:high]
    n = x.shape[0]
    for k in range(n):
        out[k] = ZERO
    for q in range(n // 4):
        j = low + 4 * q
        s0, s1, s2, s3 = x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]
        r0, r1, r2, r3 = inner[j, low:high], inner[j + 1, low:high], inner[j + 2, low:high], inner[j + 3, low:high]
        for k in range(n):
            out[k] += s0 * r0[k] + s1 * r1[k] + s2 * r2[k] + s3 * r3[k]
    for j in range(n - n % 4, n):
        add_move(out, inner[low + j, low:high], x[j])
    total = ZERO
    for k in range(n):
        total += x[k] * out[k]
    return total


@njit(**FUSED)
def move_codes(w, r, h, inner, values, scale, minimum, linear, ladder, middles, group, moved):
    """Every weight of one row to the code nearest to where its own parabola is lowest."""
    for g in range(scale.shape[0]):
        s, m = scale[g], minimum[g]
        if s == ZERO:
            continue
        inverse = ONE / s
        for j in range(g * group, (g + 1) * group):
            x = (w[j] - r[j] / (h * inner[j, j]) - m) * inverse
            if linear:
                v = min(max(np.rint(x), ladder[0]), ladder[-1])
            else:
                place = 0
                for k in range(middles.shape[0]):
                    place += 1 if x >= middles[k] else 0
                v = ladder[place]
            if v != values[j]:
                delta = s * v + m - w[j]
                values[j] = v
                w[j] += delta
                moved[j] += delta
                add_move(r, inner[j], h * delta)


@njit(**FUSED)
def move_entries(w, r, h, inner, entries, signs, shift, scale, group, width, bits, signed, even, middles, book, index, start, neighbours, moved):  # fmt: skip
    """The same for code books, eight weights at a time: the entry nearest to the point where each parabola is lowest."""
    goal, size, weight, after = np.empty(8, F32), np.empty(8, F32), np.empty(8, F32), np.empty(8, F32)
    chosen = np.empty(8 // width, np.int32)
    for u in range(w.shape[0] // 8):
        at, s, up = 8 * u, scale[8 * u // group], shift[u]
        if s == ZERO:
            continue
        for i in range(8):
            weight[i] = inner[at + i, at + i]
            goal[i] = w[at + i] - r[at + i] / (h * weight[i])
            size[i] = goal[i]
        byte = split_signs(goal, 0, weight, even, size) if signed else 0
        for e in range(8 // width):
            entry = nearest_entry(size, e * width, width, weight, s, up, middles, bits, book, index, start, neighbours)
            chosen[e] = entry
            for i in range(e * width, (e + 1) * width):
                q = s * (F32(book[entry, i - e * width]) + up)
                after[i] = (-q if (byte >> i) & 1 else q) - w[at + i]
        slope, curve = ZERO, ZERO
        for i in range(8):
            slope += r[at + i] * after[i]
            row, part = inner[at + i], ZERO
            for k in range(8):
                part += row[at + k] * after[k]
            curve += after[i] * part
        if slope + HALF * h * curve < ZERO:
            signs[u] = byte
            for e in range(8 // width):
                entries[u * (8 // width) + e] = chosen[e]
            for i in range(8):
                if after[i] != ZERO:
                    w[at + i] += after[i]
                    moved[at + i] += after[i]
                    add_move(r, inner[at + i], h * after[i])


@njit(**FUSED)
def stretch(w, r, h, inner, a, size, low, high, image, moved):
    """Add size · a to the weights low … high. image: inner · a over these columns, as ``quadratic`` leaves it."""
    for j in range(low, high):
        delta = size * a[j]
        w[j] += delta
        moved[j] += delta
        if high - low < r.shape[0]:
            add_move(r, inner[j], h * delta)
    if high - low == r.shape[0]:
        for k in range(r.shape[0]):
            r[k] += h * size * image[k]


@njit(**FUSED)
def move_scales(w, r, h, inner, places, factors, block_scale, minimum, group, per, a, image, moved):
    """Every group's integer scale to the one nearest to its optimum, codes unchanged."""
    for g in range(places.shape[0]):
        low, high, factor = g * group, (g + 1) * group, factors[places[g]]
        if factor == ZERO or block_scale[g // per] == ZERO:
            continue
        slope = ZERO
        for j in range(low, high):
            a[j] = w[j] - minimum[g]
            slope += r[j] * a[j]
        curve = h * quadratic(a, inner, low, high, image)
        if curve <= ZERO:
            continue
        goal, new, least = factor * (ONE - slope / curve), 0, F32(np.inf)
        for k in range(factors.shape[0]):
            distance = abs(factors[k] - goal)
            if distance < least:
                least, new = distance, k
        size = factors[new] / factor - ONE
        if new != places[g] and size * (slope + HALF * size * curve) < ZERO:
            places[g] = new
            stretch(w, r, h, inner, a, size, low, high, image, moved)


@njit(**FUSED)
def move_minimums(w, r, h, inner, integers, top, block_minimum, group, per, a, image, moved):
    """Every group's integer minimum to the one nearest to its optimum, codes and scales unchanged."""
    for g in range(integers.shape[0]):
        low, high, unit = g * group, (g + 1) * group, block_minimum[g // per]
        if unit == ZERO:
            continue
        slope = ZERO
        for j in range(low, high):
            a[j] = unit
            slope += r[j] * unit
        curve = h * quadratic(a, inner, low, high, image)
        if curve <= ZERO:
            continue
        new = np.int32(min(max(np.rint(F32(integers[g]) - slope / curve), ZERO), F32(top)))
        size = F32(new - integers[g])
        if size != ZERO and size * (slope + HALF * size * curve) < ZERO:
            integers[g] = new
            stretch(w, r, h, inner, a, size, low, high, image, moved)


@njit(**FUSED)
def move_blocks(w, r, h, inner, halves, minimum, group, per, of_scale, a, image, moved):
    """Every block's half-precision scale (or minimum) to its optimum, all integers unchanged."""
    for b in range(halves.shape[0]):
        low, high, slope = b * per * group, (b + 1) * per * group, ZERO
        if halves[b] == ZERO:
            continue
        for g in range(b * per, (b + 1) * per):
            for j in range(g * group, (g + 1) * group):
                a[j] = w[j] - minimum[g] if of_scale else minimum[g]
                slope += r[j] * a[j]
        curve = h * quadratic(a, inner, low, high, image)
        if curve <= ZERO:
            continue
        new = from_half(to_half(halves[b] * (ONE - slope / curve)))
        size = new / halves[b] - ONE
        if size * (slope + HALF * size * curve) < ZERO and abs(new) < F32(65504):
            halves[b] = new
            stretch(w, r, h, inner, a, size, low, high, image, moved)


@njit(**FUSED)
def group_numbers(places, factors, block_scale, integers, block_minimum, per, scale, minimum):
    """Scale and minimum of every group, as decoding gives them."""
    for g in range(scale.shape[0]):
        b = g // per
        scale[g] = block_scale[b] * factors[places[g]] if places.shape[0] else block_scale[b]
        if integers.shape[0]:
            minimum[g] = block_minimum[b] * F32(integers[g])
        else:
            minimum[g] = block_minimum[b] if block_minimum.shape[0] else ZERO


@njit(**FUSED)
def descend(
    gradient, outer, inner, w, codes, signs, shift, places, factors, integers, top, block_scale, block_minimum,
    group, per, tunes_scale, tune, linear, ladder, middles, width, bits, signed, even, book, index, start, neighbours,
):  # fmt: skip
    """One pass over a panel of rows and a block of columns; all numbers are changed in place.

    gradient: float32 (rows, block) of the loss, replaced by what the caller needs: Δ · inner, the change of each row
    times the metric. outer: float32 (rows, rows). inner: float32 (block, block). w: float32 (rows, block), as
    decoded. codes: values of the codes, float32 (rows, block), or entries of a code book. tune: whether scales and
    minimums move too.
    """
    rows, columns = w.shape
    groups = columns // group
    before, moved = np.empty(columns, F32), np.empty(columns, F32)
    a, image = np.empty(columns, F32), np.empty(columns, F32)
    scale, minimum = np.empty(groups, F32), np.empty(groups, F32)
    for i in range(rows):
        h, r = outer[i, i], gradient[i]
        before[:] = r
        moved[:] = ZERO
        for turn in range(2 if tune else 1):
            group_numbers(places[i], factors, block_scale[i], integers[i], block_minimum[i], per, scale, minimum)
            if tune and turn == 1:
                if places.shape[1]:
                    move_scales(w[i], r, h, inner, places[i], factors, block_scale[i], minimum, group, per, a, image, moved)
                if integers.shape[1]:
                    move_minimums(w[i], r, h, inner, integers[i], top, block_minimum[i], group, per, a, image, moved)
                if tunes_scale:
                    group_numbers(places[i], factors, block_scale[i], integers[i], block_minimum[i], per, scale, minimum)
                    move_blocks(w[i], r, h, inner, block_scale[i], minimum, group, per, True, a, image, moved)
                if block_minimum.shape[1]:
                    move_blocks(w[i], r, h, inner, block_minimum[i], minimum, group, per, False, a, image, moved)
                group_numbers(places[i], factors, block_scale[i], integers[i], block_minimum[i], per, scale, minimum)
            if width == 0:
                move_codes(w[i], r, h, inner, codes[i], scale, minimum, linear, ladder, middles, group, moved)
            else:
                move_entries(w[i], r, h, inner, codes[i], signs[i], shift[i], scale, group, width, bits, signed, even, middles, book, index, start, neighbours, moved)  # fmt: skip
        inverse = ONE / h
        for j in range(columns):
            before[j] = (r[j] - before[j]) * inverse
        for k in range(i + 1, rows):
            add_move(gradient[k], before, outer[k, i])
        r[:] = before
