"""Numba: ggml's encoders of the formats with code books of magnitudes (IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S).

Source: llama.cpp, ggml/src/ggml-quants.c (quantize_row_iq2_xxs_impl and its neighbours). The five searches
are one, with the parameters of ``Search``; where bits go comes from the format's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from quantkit.encoders.books import book
from quantkit.encoders.loops_scales import ONE, TINY, ZERO, clamp, mean_square, nearest
from quantkit.formats import get_format
from quantkit.formats.layout import Grid
from quantkit.formats.loops_bits import field_offset, pieces, put_half, store
from quantkit.formats.loops_half import OPTIONS, to_half

F32 = np.float32
HALF, LARGEST = F32(0.5), F32(3.4028234663852886e38)


class Search(NamedTuple):
    """How ggml searches one format.

    variance: factor of the block's mean square in the weights. plain: weights without importance are
    plain · variance · mean square + x². reach, step: inverse scales tried are (top + i · step) / largest for
    |i| ≤ reach. least: a group whose largest magnitude is below it is zero. fudge: factor of the block's scale.
    fitted: the largest magnitude is replaced by one from a search over plain levels. again_all: once a group of
    the code book is off it, all of them (not only those off) are searched again at the fitted scale; always_again:
    even if none is.
    """

    variance: float
    reach: int
    step: float
    least: float
    fudge: float
    plain: float = 0.0
    fitted: bool = False
    again_all: bool = False
    starts_off: bool = False


SEARCHES = {
    "IQ2_XXS": Search(1, 6, 0.1, 1e-15, 1.0, fitted=True, again_all=True, starts_off=True),
    "IQ2_XS": Search(1, 9, 0.1, 1e-15, 1.0),
    "IQ2_S": Search(2, 9, 0.1, 1e-8, 0.9875, plain=0.25),
    "IQ3_XXS": Search(2, 15, 0.2, 1e-8, 1.0125),
    "IQ3_S": Search(2, 9, 0.2, 1e-45, 1.033, again_all=True, starts_off=True),
}


@njit(**OPTIONS)
def wrapped_search(x, n, nmax, w, codes):
    """ggml's make_qp_quants as it behaves for negative x: codes are unsigned bytes and wrap around."""
    largest = ZERO
    for i in range(n):
        largest = max(largest, x[i])
    if largest < TINY:
        return ZERO
    fmax = F32(nmax)
    chosen = fmax / largest
    best = ZERO
    for i in range(n):
        diff = x[i] - (ONE / chosen) * F32(nearest(chosen * x[i]) & 255)
        best += w[i] * diff * diff
    for step in range(-4, 5):
        if step != 0:
            inverse = (F32(0.1) * F32(step) + fmax) / largest
            error = ZERO
            for i in range(n):
                diff = x[i] - (ONE / inverse) * F32(min(np.int32(nmax), nearest(inverse * x[i])))
                error += w[i] * diff * diff
            if error < best:
                best, chosen = error, inverse
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(n):
        code = min(np.int32(nmax), nearest(chosen * x[i]))
        codes[i] = code & 255
        sum_lx += w[i] * x[i] * F32(code)
        sum_l2 += w[i] * F32(code) * F32(code)
    for _ in range(5):
        changed = False
        for i in range(n):
            old = F32(codes[i])
            lx = sum_lx - w[i] * x[i] * old
            l2 = sum_l2 - w[i] * old * old
            if lx > ZERO and l2 > ZERO:
                new = min(np.int32(nmax), nearest(x[i] * l2 / lx))
                if new != codes[i]:
                    lx += w[i] * x[i] * F32(new)
                    l2 += w[i] * F32(new) * F32(new)
                    if lx * lx * sum_l2 > sum_lx * sum_lx * l2:
                        codes[i] = new & 255
                        sum_lx, sum_l2 = lx, l2
                        changed = True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > ZERO else ZERO


@njit(inline="always", **OPTIONS)
def entry_at(xval, w, at, width, bits, inverse, scale, levels, entries, index, start, neighbours):
    """Whether the magnitudes xval[at : at+width] are on the book; levels there become the chosen entry's.

    The rounded point itself if it is on the book, else the neighbour with the least weighted error.
    """
    point = 0
    for i in range(width):
        level = clamp(nearest(HALF * (inverse * xval[np.uintp(at + i)] - ONE)), 0, 7 if bits == 3 else 2)
        levels[np.uintp(at + i)] = level
        point |= level << (bits * i)
    chosen = index[np.uintp(point)]
    if chosen >= 0:
        return True
    best = LARGEST
    first = start[np.uintp(point)]
    chosen = neighbours[np.uintp(first)]
    for n in range(start[np.uintp(point + 1)] - first):
        entry = neighbours[np.uintp(first + n)]
        distance = ZERO
        for i in range(width):
            diff = scale * entries[np.uintp(entry), np.uintp(i)] - xval[np.uintp(at + i)]
            distance += w[np.uintp(at + i)] * diff * diff
        if distance < best:
            best, chosen = distance, entry
    for i in range(width):
        levels[np.uintp(at + i)] = (np.int32(entries[np.uintp(chosen), np.uintp(i)]) - 1) // 2
    return False


@njit(inline="always", **OPTIONS)
def line_through(xval, w, levels, n):
    """(Σ w·x·q, Σ w·q²) with q = 2·level + 1, in order."""
    sum_qx, sum_q2 = ZERO, ZERO
    for i in range(n):
        q = F32(2 * levels[i] + 1)
        sum_qx += w[i] * xval[i] * q
        sum_q2 += w[i] * q * q
    return sum_qx, sum_q2


@njit(inline="always", **OPTIONS)
def magnitudes(row, at, n, w, even, xval, signs):
    """Magnitudes and sign bytes of n weights. even: an odd number of minus signs in eight flips the cheapest."""
    for k in range(n // 8):
        bits, flips = 0, 0
        for i in range(8):
            v = row[at + 8 * k + i]
            negative = not v >= ZERO
            xval[8 * k + i] = -v if negative else v
            bits |= (1 if negative else 0) << i
            flips += 1 if negative else 0
        if even and flips % 2:
            cheapest = 0
            least = w[8 * k] * row[at + 8 * k] * row[at + 8 * k]
            for i in range(1, 8):
                cost = w[8 * k + i] * row[at + 8 * k + i] * row[at + 8 * k + i]
                if cost < least:
                    least, cheapest = cost, i
            xval[8 * k + cheapest] = -xval[8 * k + cheapest]
            bits ^= 1 << cheapest
        signs[k] = bits & 127 if even else bits


@njit(inline="always", **OPTIONS)
def best_scale(
    xval, w, root, n, width, bits, largest, scale, top, reach, step, always, again_all, off, trial_off, levels, trial,
    entries, index, start, neighbours,
):  # fmt: skip
    """Scale of n magnitudes and, in levels, their entries: the best of 2 · reach + 1 inverse scales, then once more.

    off: for each entry, whether its weights were off the book; as it comes it says what holds if no trial wins.
    """
    best = ZERO
    for i in range(-reach, reach + 1):
        inverse = (top + F32(i) * step) / largest
        for k in range(n // width):
            trial_off[k] = not entry_at(
                xval, root, width * k, width, bits, inverse, ONE / inverse, trial, entries, index, start, neighbours
            )
        sum_qx, sum_q2 = line_through(xval, w, trial, n)
        if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
            scale = sum_qx / sum_q2
            best = scale * sum_qx
            levels[:] = trial
            off[:] = trial_off
    again = always
    for k in range(n // width):
        again = again or off[k]
    if again and scale > ZERO:
        inverse = ONE / scale
        for k in range(n // width):
            if again_all or off[k]:
                entry_at(xval, root, width * k, width, bits, inverse, scale, levels, entries, index, start, neighbours)
        sum_qx, sum_q2 = line_through(xval, w, levels, n)
        if sum_q2 > ZERO:
            scale = sum_qx / sum_q2
    return scale


@njit(inline="always", **OPTIONS)
def place_group(dst, levels, sign_bits, flip, g, place, n, width, bits, even, skips, code_at, sign_at, sign_byte, index):
    """Write the entries and signs of group g. skips: the low byte of an entry and its signs go to ``place`` instead."""
    for k in range(n // width):
        point = 0
        for i in range(width):
            point |= levels[width * k + i] << (bits * i)
        if skips:
            dst[code_at[place * (n // width) + k, 0, 0]] = np.uint8(index[point] & 255)
            store(dst, code_at, g * (n // width) + k, index[point] & 256)
        else:
            store(dst, code_at, g * (n // width) + k, index[point])
    for k in range(n // 8):
        byte = ~sign_bits[k] if flip else sign_bits[k]
        if even:
            store(dst, sign_at, g * (n // 8) + k, byte & 127)
        else:
            dst[sign_byte + place * (n // 8) + k] = np.uint8(byte & 255)


def make_encoder(name: str) -> Callable[[np.ndarray, np.ndarray, bool, np.ndarray], None]:
    """The encoder of a format: (x, importance, weighted, out) as in loops_kquants."""
    fmt = get_format(name)
    assert isinstance(fmt.values, Grid) and fmt.signs is not None
    entries, index, start, neighbours = book(fmt.values.name)
    loop = _compile(name, entries)

    def encode(x, importance, weighted, out):
        loop(x, importance, weighted, out, index, start, neighbours)

    return encode


def _compile(name: str, entries: np.ndarray) -> Callable[..., None]:
    fmt, s, width = get_format(name), SEARCHES[name], entries.shape[1]
    block, groups = fmt.block_bytes(), fmt.groups()
    n = 256 // groups
    bits = 2 if width == 8 else 3
    top = F32(5 if bits == 2 else 15)
    signs = fmt.signs
    assert signs is not None and fmt.codes is not None
    even = signs.width == 7
    code_at, scale_at, half = pieces(fmt.codes, fmt), pieces(fmt.scales, fmt), field_offset(fmt, "d")
    sign_at = pieces(signs, fmt)
    sign_byte = int(signs.positions(fmt.layout)[0, 0]) // 8
    skips = name == "IQ3_S"  # there a group of zeros does not advance the place of codes and signs
    variance, least, fudge, plain = F32(s.variance), F32(s.least), F32(s.fudge), F32(s.plain)
    reach, step, fitted, again_all, starts_off = s.reach, F32(s.step), s.fitted, s.again_all, s.starts_off

    @njit(**OPTIONS)
    def encode(x, importance, weighted, out, index, start, neighbours):
        xval, w, root = np.empty(n, F32), np.empty(n, F32), np.empty(n, F32)
        levels, trial = np.zeros(n, np.int32), np.zeros(n, np.int32)
        off, trial_off = np.zeros(n // width, np.bool_), np.zeros(n // width, np.bool_)
        scales, sign_bits = np.empty(groups, F32), np.zeros(n // 8, np.int32)
        for r in range(x.shape[0]):
            row = x[r]
            for b in range(x.shape[1] // 256):
                at, dst = 256 * b, out[r, block * b : block * (b + 1)]
                dst[:] = 0
                sigma2 = variance * mean_square(row, at, 256)
                live, largest_scale = 0, ZERO
                for g in range(groups):
                    s0 = at + n * g
                    for i in range(n):
                        v = row[s0 + i]
                        w[i] = importance[s0 + i] * np.sqrt(sigma2 + v * v) if weighted else plain * sigma2 + v * v
                        root[i] = np.sqrt(w[i])
                    magnitudes(row, s0, n, w, even, xval, sign_bits)
                    largest = xval[0]
                    for i in range(1, n):
                        largest = max(largest, xval[i])
                    scales[g] = ZERO
                    if largest < least:
                        continue
                    scale = largest / top
                    if fitted:
                        scale = wrapped_search(xval, n, 4, w, levels)
                        largest = scale * F32(3)
                        if largest <= ZERO:
                            continue
                    else:
                        levels[:] = 0
                    off[:] = starts_off
                    scale = best_scale(
                        xval, w, root, n, width, bits, largest, scale, top, reach, step, fitted, again_all, off, trial_off,
                        levels, trial, entries, index, start, neighbours,
                    )  # fmt: skip
                    scales[g] = abs(scale)
                    largest_scale = max(largest_scale, scales[g])
                    place_group(
                        dst, levels, sign_bits, scale < ZERO, g, live if skips else g, n, width, bits, even, skips,
                        code_at, sign_at, sign_byte, index,
                    )  # fmt: skip
                    live += 1
                if largest_scale == ZERO:
                    continue
                d = largest_scale / F32(31)
                put_half(dst, half, to_half(d * fudge))
                for g in range(groups):
                    store(dst, scale_at, g, clamp(nearest(HALF * (ONE / d * scales[g] - ONE)), 0, 15))

    return encode
