"""Numba: the scale searches of ggml's K- and legacy quants, to the bit.

Source of the arithmetic: llama.cpp, ggml/src/ggml-quants.c (make_qx_quants, make_qkx2/3_quants,
make_qp_quants, make_q3_quants). ggml tries its candidate scales one after the other; here the
candidates, or where they depend on each other 16 sub-blocks, are the lanes of a vector and the weights
are the loop: each sum is accumulated in the same order (equal bits) while the processor works on many.

Imported only inside functions: importing Numba costs about a second.
All literals are float32 on purpose; a single float64 would change the bytes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.formats.loops_half import OPTIONS

ZERO, ONE = np.float32(0), np.float32(1)
TENTH = np.float32(0.1)
# Adding and subtracting 1.5 · 2²³ rounds a float32 to the nearest integer, ties to even.
ROUND = np.float32(12582912.0)
TINY = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: a block below this is all zero


@njit(**OPTIONS)
def all_finite(bits):
    """Whether no float32 (given as uint32 rows) is NaN or infinite: none has all bits of the exponent set."""
    bad = np.uint32(0)
    for r in range(bits.shape[0]):
        row = bits[r]
        for i in range(row.shape[0]):
            bad |= np.uint32((row[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
    return bad == np.uint32(0)


@njit(**OPTIONS)
def halves_finite(packed, at, block_bytes):
    """Whether the half-precision number at byte ``at`` of every block is finite. packed: uint8 rows."""
    bad = 0
    for r in range(packed.shape[0]):
        row = packed[r]
        for b in range(row.shape[0] // block_bytes):
            bad |= 1 if (row[block_bytes * b + at + 1] & 0x7C) == 0x7C else 0
    return bad == 0


@njit(**OPTIONS)
def mean_square(x, at, n):
    """Sum of squares of x[at:at+n] divided by n, accumulated in order."""
    total = ZERO
    for i in range(n):
        total += x[at + i] * x[at + i]
    return total / np.float32(n)


@njit(inline="always", **OPTIONS)
def nearest(value):
    """Nearest integer as ggml computes it, also for values where the trick wraps around."""
    shifted = np.float32(value) + ROUND
    return np.int32(np.int32(np.float32(shifted).view(np.int32) & np.int32(0x007FFFFF)) - np.int32(0x00400000))


@njit(inline="always", **OPTIONS)
def clamp(value, low, high):
    """value limited to low … high, all int32."""
    return max(np.int32(low), min(np.int32(high), np.int32(value)))


# Rows of the scratch array ``fit`` of the affine search: 16 lanes each, at fixed offsets of one array,
# so that the compiler can prove they do not overlap and makes one vector of each loop over lanes.
SCALE, MINIMUM, LOW, HIGH, SUM_W, SUM_X, BEST, INV, SUM_L, SUM_L2, SUM_XL, ERROR, USED_INV, USED_LOW = range(0, 224, 16)
FIT = 224


@njit(**OPTIONS)
def load_lanes(x, at, n, rows, lanes):
    """lanes[32·i + g] = x[at + n·g + i]: sub-block g becomes lane g; lanes from ``rows`` on repeat the last."""
    for g in range(16):
        start = at + n * min(g, rows - 1)
        for i in range(n):
            lanes[32 * i + g] = x[start + i]


@njit(**OPTIONS)
def affine_start(lanes, n, fmax, mean_abs, fit):
    """Range, sums and the error of the plain inverse scale for each lane."""
    for g in range(16):
        fit[LOW + g] = lanes[g]
        fit[HIGH + g] = lanes[g]
        fit[SUM_W + g] = lanes[16 + g]
        fit[SUM_X + g] = lanes[16 + g] * lanes[g]
        fit[BEST + g] = ZERO
    for i in range(1, n):
        for g in range(16):
            v, w = lanes[32 * i + g], lanes[32 * i + 16 + g]
            fit[LOW + g] = v if v < fit[LOW + g] else fit[LOW + g]
            fit[HIGH + g] = v if v > fit[HIGH + g] else fit[HIGH + g]
            fit[SUM_W + g] += w
            fit[SUM_X + g] += w * v
    for g in range(16):
        fit[LOW + g] = ZERO if fit[LOW + g] > ZERO else fit[LOW + g]
        fit[USED_LOW + g] = fit[LOW + g]
        fit[USED_INV + g] = fmax / (fit[HIGH + g] - fit[LOW + g])
        fit[SCALE + g] = ONE / fit[USED_INV + g]
        fit[MINIMUM + g] = fit[LOW + g]
    for i in range(n):
        for g in range(16):
            v = lanes[32 * i + g]
            l = (fit[USED_INV + g] * (v - fit[LOW + g]) + ROUND) - ROUND
            l = min(max(l, ZERO), fmax)
            diff = fit[SCALE + g] * l + fit[LOW + g] - v
            fit[BEST + g] += lanes[32 * i + 16 + g] * (abs(diff) if mean_abs else diff * diff)


@njit(**OPTIONS)
def affine_try(lanes, n, fmax, grid, mean_abs, fit):
    """One candidate for each lane: codes at (high − low) / grid, the line through them, its error."""
    for g in range(16):
        fit[INV + g] = grid / (fit[HIGH + g] - fit[LOW + g])
        fit[SUM_L + g] = ZERO
        fit[SUM_L2 + g] = ZERO
        fit[SUM_XL + g] = ZERO
        fit[ERROR + g] = ZERO
    for i in range(n):
        for g in range(16):
            v = lanes[32 * i + g]
            l = (fit[INV + g] * (v - fit[LOW + g]) + ROUND) - ROUND
            l = min(max(l, ZERO), fmax)
            wl = lanes[32 * i + 16 + g] * l
            fit[SUM_L + g] += wl
            fit[SUM_L2 + g] += wl * l
            fit[SUM_XL + g] += wl * v
    for g in range(16):  # weighted least squares; slope and minimum replace two of the sums
        l, l2, xl = fit[SUM_L + g], fit[SUM_L2 + g], fit[SUM_XL + g]
        det = fit[SUM_W + g] * l2 - l * l
        slope = (fit[SUM_W + g] * xl - fit[SUM_X + g] * l) / det
        minimum = (l2 * fit[SUM_X + g] - l * xl) / det
        slope = xl / l2 if minimum > ZERO else slope
        fit[SUM_L + g] = slope if det > ZERO else np.float32(np.nan)
        fit[SUM_L2 + g] = min(minimum, ZERO)
    for i in range(n):
        for g in range(16):
            v = lanes[32 * i + g]
            l = (fit[INV + g] * (v - fit[LOW + g]) + ROUND) - ROUND
            l = min(max(l, ZERO), fmax)
            diff = fit[SUM_L + g] * l + fit[SUM_L2 + g] - v
            fit[ERROR + g] += lanes[32 * i + 16 + g] * (abs(diff) if mean_abs else diff * diff)
    for g in range(16):
        better = fit[ERROR + g] < fit[BEST + g]
        fit[USED_INV + g] = fit[INV + g] if better else fit[USED_INV + g]
        fit[USED_LOW + g] = fit[LOW + g] if better else fit[USED_LOW + g]
        fit[SCALE + g] = fit[SUM_L + g] if better else fit[SCALE + g]
        fit[LOW + g] = fit[SUM_L2 + g] if better else fit[LOW + g]
        fit[BEST + g] = fit[ERROR + g] if better else fit[BEST + g]


@njit(**OPTIONS)
def affine_search(lanes, n, nmax, rmin, rdelta, steps, mean_abs, fit):
    """Scales and minimums of 16 sub-blocks at once: the best of ``steps + 2`` inverse scales each.

    lanes: float32 (32·n,) as load_lanes leaves it, with the weights' importance at 32·i + 16 + g;
    fit: float32 (FIT,). Rows SCALE and MINIMUM (negated) are the result. A better candidate moves the
    minimum from which later candidates start, as in ggml, so candidates run in order and the lanes
    are sub-blocks.
    """
    fmax = np.float32(nmax)
    affine_start(lanes, n, fmax, mean_abs, fit)
    for step in range(steps + 1):
        affine_try(lanes, n, fmax, rmin + rdelta * np.float32(step) + fmax, mean_abs, fit)
    for g in range(16):
        dead = fit[HIGH + g] <= fit[MINIMUM + g]  # all weights alike and not positive
        fit[SCALE + g] = ZERO if dead else fit[SCALE + g]
        fit[USED_INV + g] = ZERO if dead else fit[USED_INV + g]
        fit[MINIMUM + g] = -fit[MINIMUM + g] if dead else -fit[LOW + g]


@njit(**OPTIONS)
def affine_codes(lanes, n, count, first, nmax, fit, codes):
    """Codes that the search chose for lanes first … first+count−1, in the order of the weights."""
    for g in range(count):
        inverse, low = fit[USED_INV + first + g], fit[USED_LOW + first + g]
        for i in range(n):
            codes[n * g + i] = clamp(nearest(inverse * (lanes[32 * i + first + g] - low)), 0, nmax)


@njit(**OPTIONS)
def symmetric_search(x, at, n, w, nmax, codes, acc):
    """Scale of one sub-block with codes −nmax … nmax−1: the best of 19 inverse scales.

    codes: int32 (n,) out, stored with nmax added; acc: float32 scratch (3, 32). Returns the scale.
    """
    peak = first_peak(x, at, n)
    if abs(peak) < TINY:
        codes[:n] = 0
        return ZERO
    fmax = np.float32(nmax)
    low, high = -fmax, fmax - ONE
    inv, sum_lx, sum_l2 = acc[0], acc[1], acc[2]
    for s in range(32):
        step = s - 10 if s <= 9 else s - 9  # lane 0 is the plain maximum, then −9 … −1, 1 … 9
        if s == 0:
            inv[s] = -fmax / peak
        else:
            inv[s] = -(fmax + TENTH * np.float32(step)) / peak
        sum_lx[s] = ZERO
        sum_l2[s] = ZERO
    for i in range(n):
        v, wi = x[at + i], w[i]
        wx = wi * v
        for s in range(32):
            l = (inv[s] * v + ROUND) - ROUND
            l = min(max(l, low), high)
            sum_lx[s] += wx * l
            sum_l2[s] += wi * l * l
    scale = sum_lx[0] / sum_l2[0] if sum_l2[0] != ZERO else ZERO
    best = scale * sum_lx[0]
    chosen = 0
    for s in range(1, 19):
        if sum_l2[s] > ZERO and sum_lx[s] * sum_lx[s] > best * sum_l2[s]:
            scale = sum_lx[s] / sum_l2[s]
            best = scale * sum_lx[s]
            chosen = s
    for i in range(n):
        codes[i] = nmax + clamp(nearest(inv[chosen] * x[at + i]), -nmax, nmax - 1)
    return scale


@njit(fastmath={"nnan", "nsz"}, **OPTIONS)
def extremes(x, at, n):
    """Smallest and largest of x[at:at+n]; the flags only let the compiler vectorize the comparison."""
    low, high = x[at], x[at]
    for i in range(1, n):
        low = min(low, x[at + i])
        high = max(high, x[at + i])
    return low, high


@njit(**OPTIONS)
def first_peak(x, at, n):
    """The first of the entries of x[at:at+n] with the largest magnitude, 0 if all are zero."""
    low, high = extremes(x, at, n)
    return first_of(x, at, n, high) if high == -low else max(high, -low) * (ONE if high > -low else -ONE)


@njit(**OPTIONS)
def first_of(x, at, n, size):
    """The first of x[at:at+n] whose magnitude is ``size``, 0 if that is 0: decides a tie of signs."""
    for i in range(n):
        if abs(x[at + i]) == size and size > ZERO:
            return x[at + i]
    return ZERO


@njit(**OPTIONS)
def positive_search(x, n, nmax, w, codes, acc):
    """Scale for n non-negative numbers (sub-block scales or minimums) with codes 0 … nmax.

    x, w: float32 (n,); codes: int32 (n,) out; acc: float32 scratch (3, 32). Returns the scale.
    """
    largest = ZERO
    for i in range(n):
        largest = max(largest, x[i])
    if largest < TINY:
        codes[:n] = 0
        return ZERO
    fmax = np.float32(nmax)
    inv, err = acc[0], acc[1]
    for s in range(16):
        step = s - 5 if s <= 4 else s - 4  # lane 0 is the plain maximum, then −4 … −1, 1 … 4
        inv[s] = fmax / largest if s == 0 else (TENTH * np.float32(step) + fmax) / largest
        err[s] = ZERO
    for i in range(n):
        v, wi = x[i], w[i]
        for s in range(16):
            l = min((inv[s] * v + ROUND) - ROUND, fmax)
            diff = v - (ONE / inv[s]) * l
            err[s] += wi * diff * diff
    chosen = 0
    for s in range(1, 9):
        if err[s] < err[chosen]:
            chosen = s
    sum_lx, sum_l2 = ZERO, ZERO
    for i in range(n):
        code = min(np.int32(nmax), nearest(inv[chosen] * x[i]))
        codes[i] = code
        l = np.float32(code)
        sum_lx += w[i] * x[i] * l
        sum_l2 += w[i] * l * l
    for _ in range(5):
        changed = False
        for i in range(n):
            l = np.float32(codes[i])
            lx = sum_lx - w[i] * x[i] * l
            l2 = sum_l2 - w[i] * l * l
            if lx > ZERO and l2 > ZERO:
                new = min(np.int32(nmax), nearest(x[i] * l2 / lx))
                if new != codes[i]:
                    l = np.float32(new)
                    lx += w[i] * x[i] * l
                    l2 += w[i] * l * l
                    if lx * lx * sum_l2 > sum_lx * sum_lx * l2:
                        codes[i] = new
                        sum_lx, sum_l2 = lx, l2
                        changed = True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > ZERO else ZERO


# Rows of the scratch array ``lanes`` of the Q3_K search: 16 rows of weights, 16 of codes, then these.
PEAK, Q3_LX, Q3_L2, Q3_ROWS = 512, 528, 544, 560


@njit(**OPTIONS)
def q3_pass(lanes):
    """One round of coordinate descent over the codes of all 16 sub-blocks; returns how many changed."""
    changed = 0
    for i in range(16):
        for g in range(16):
            v = lanes[16 * i + g]
            w = v * v
            l = lanes[256 + 16 * i + g]
            lx = lanes[Q3_LX + g] - w * v * l
            l2 = lanes[Q3_L2 + g] - w * l * l
            new = min(max(np.float32(nearest(v * l2 / lx)), np.float32(-4)), np.float32(3))
            lx2 = lx + w * v * new
            l22 = l2 + w * new * new
            take = (lx > ZERO) & (new != l) & (l22 > ZERO)
            take = take & (lx2 * lx2 * lanes[Q3_L2 + g] > lanes[Q3_LX + g] * lanes[Q3_LX + g] * l22)
            lanes[256 + 16 * i + g] = new if take else l
            lanes[Q3_LX + g] = lx2 if take else lanes[Q3_LX + g]
            lanes[Q3_L2 + g] = l22 if take else lanes[Q3_L2 + g]
            changed += 1 if take else 0
    return changed


@njit(**OPTIONS)
def q3_search(x, at, scales, out, lanes):
    """ggml's unweighted Q3_K search for the 16 sub-blocks of x[at:at+256], one sub-block per lane.

    scales: float32 (16,) out; out: int32 (256,) codes with 4 added; lanes: float32 scratch (Q3_ROWS,).
    """
    for g in range(16):
        for i in range(16):
            lanes[16 * i + g] = x[at + 16 * g + i]
        lanes[PEAK + g] = first_peak(x, at + 16 * g, 16)
        lanes[Q3_LX + g] = ZERO
        lanes[Q3_L2 + g] = ZERO
    for i in range(16):
        for g in range(16):
            v = lanes[16 * i + g]
            l = ((np.float32(-4) / lanes[PEAK + g]) * v + ROUND) - ROUND
            l = min(max(l, np.float32(-4)), np.float32(3))
            lanes[256 + 16 * i + g] = l
            w = v * v
            lanes[Q3_LX + g] += w * v * l
            lanes[Q3_L2 + g] += w * l * l
    for _ in range(5):
        if q3_pass(lanes) == 0:
            break
    for g in range(16):
        dead = abs(lanes[PEAK + g]) < TINY
        l2 = lanes[Q3_L2 + g]
        scales[g] = lanes[Q3_LX + g] / l2 if (not dead and l2 > ZERO) else ZERO
        for i in range(16):
            out[16 * g + i] = 0 if dead else np.int32(lanes[256 + 16 * i + g]) + 4
