"""Triton: the scale searches of ggml's K-quants, to the bit. Imported only inside functions.

A lane is a group of weights that share a scale; it goes through its weights one after the other, so that every sum is
accumulated in ggml's order. Divisions are rounded as IEEE says, and nothing may be contracted (``enable_fp_fusion``
off), or the bytes would differ. Source of the arithmetic: llama.cpp, ggml/src/ggml-quants.c; encoders/loops_scales.py
is the same for the CPU. Tables of candidates come as float32 from the driver.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1e-15)  # a group below this is all zero
ROUND = tl.constexpr(12582912.0)  # adding and subtracting 1.5 · 2²³ rounds to the nearest integer, ties to even


@triton.jit
def rounded(value):
    return (value + ROUND) - ROUND


@triton.jit
def nearest(value):
    """The nearest integer as ggml computes it, int32, also where the trick wraps around."""
    return ((value + ROUND).to(tl.int32, bitcast=True) & 0x007FFFFF) - 0x00400000


@triton.jit
def clamped(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def first_peak(x, base, n, live, LANES: tl.constexpr):
    """The first of each group's n weights with the largest magnitude."""
    peak = tl.zeros((LANES,), tl.float32)
    for i in range(n):
        v = tl.load(x + base + i, mask=live, other=0.0)
        peak = tl.where(tl.abs(v) > tl.abs(peak), v, peak)
    return peak


@triton.jit
def ordered_sum(x, out, count, n, SQUARED: tl.constexpr, LANES: tl.constexpr):
    """out[g] = Σ x[g, i] or Σ x[g, i]², in order. x: float32 (count, n)."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < count
    total = tl.zeros((LANES,), tl.float32)
    for i in range(n):
        v = tl.load(x + lane * n + i, mask=live, other=0.0)
        total += v * v if SQUARED else v
    tl.store(out + lane, total, mask=live)


@triton.jit
def affine_fit(
    x, weight, grids, scale, minimum, inverse, offset, count, n, steps, top, MEAN_ABS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Scale and (negated) minimum of each group, and the inverse scale and offset that its codes come from.

    x, weight: float32 (count, n); grids: float32 (steps,), candidates of top · range / scale; out: float32 (count,).
    """
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < count
    base = lane * n
    low = tl.load(x + base, mask=live, other=0.0)
    high = low
    sum_w = tl.load(weight + base, mask=live, other=0.0)
    sum_x = sum_w * low
    for i in range(1, n):
        v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
        low, high = tl.where(v < low, v, low), tl.where(v > high, v, high)
        sum_w += w
        sum_x += w * v
    low = tl.where(low > 0, 0.0, low)
    first_low, used_low = low, low
    used_inverse = tl.div_rn(tl.zeros((LANES,), tl.float32) + top, high - low)
    best_scale = tl.div_rn(tl.full((LANES,), 1.0, tl.float32), used_inverse)
    best = tl.zeros((LANES,), tl.float32)
    for i in range(n):
        v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
        code = clamped(rounded(used_inverse * (v - low)), 0.0, top)
        off = best_scale * code + low - v
        best += w * (tl.abs(off) if MEAN_ABS else off * off)
    for step in range(steps):
        trial = tl.div_rn(tl.zeros((LANES,), tl.float32) + tl.load(grids + step), high - low)
        sum_l, sum_l2, sum_xl = best * 0, best * 0, best * 0
        for i in range(n):
            v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
            code = clamped(rounded(trial * (v - low)), 0.0, top)
            share = w * code
            sum_l += share
            sum_l2 += share * code
            sum_xl += share * v
        det = sum_w * sum_l2 - sum_l * sum_l
        slope = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, det)
        bottom = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, det)
        slope = tl.where(bottom > 0, tl.div_rn(sum_xl, sum_l2), slope)
        bottom = tl.where(bottom > 0, 0.0, bottom)
        error = best * 0
        for i in range(n):
            v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
            code = clamped(rounded(trial * (v - low)), 0.0, top)
            off = slope * code + bottom - v
            error += w * (tl.abs(off) if MEAN_ABS else off * off)
        better = (error < best) & (det > 0)
        used_inverse, used_low = tl.where(better, trial, used_inverse), tl.where(better, low, used_low)
        best_scale, low = tl.where(better, slope, best_scale), tl.where(better, bottom, low)
        best = tl.where(better, error, best)
    dead = high <= first_low  # all weights alike and not positive
    tl.store(scale + lane, tl.where(dead, 0.0, best_scale), mask=live)
    tl.store(minimum + lane, tl.where(dead, -first_low, -low), mask=live)
    tl.store(inverse + lane, tl.where(dead, 0.0, used_inverse), mask=live)
    tl.store(offset + lane, used_low, mask=live)


@triton.jit
def symmetric_fit(x, weight, numerators, scale, inverse, count, n, steps, top, LANES: tl.constexpr):
    """Signed scale of each group with codes −top … top − 1, and the inverse scale of its codes (both 0 for a zero group).

    numerators: float32 (steps,), candidates of scale⁻¹ times the weight of largest magnitude; the first one is the plain one.
    """
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < count
    base = lane * n
    peak = first_peak(x, base, n, live, LANES)
    best, found, used = peak * 0, peak * 0, peak * 0
    for step in range(steps):
        trial = tl.div_rn(peak * 0 + tl.load(numerators + step), peak)
        sum_lx, sum_l2 = peak * 0, peak * 0
        for i in range(n):
            v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
            code = clamped(rounded(trial * v), -top, top - 1.0)
            sum_lx += w * v * code
            sum_l2 += w * code * code
        plain = step == 0
        take = plain | ((sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2))
        value = tl.where(sum_l2 != 0, tl.div_rn(sum_lx, sum_l2), 0.0)
        found, used = tl.where(take, value, found), tl.where(take, trial, used)
        best = tl.where(take, value * sum_lx, best)
    dead = tl.abs(peak) < TINY
    tl.store(scale + lane, tl.where(dead, 0.0, found), mask=live)
    tl.store(inverse + lane, tl.where(dead, 0.0, used), mask=live)


@triton.jit
def positive_fit(x, weight, numerators, scale, codes, count, n, steps, TOP: tl.constexpr, LANES: tl.constexpr):
    """Scale of each group of numbers that are not negative, and their codes 0 … TOP: int32 (count, n)."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < count
    base = lane * n
    largest = tl.zeros((LANES,), tl.float32)
    for i in range(n):
        largest = tl.maximum(largest, tl.load(x + base + i, mask=live, other=0.0))
    dead = largest < TINY
    used, best = largest * 0, largest * 0
    for step in range(steps):
        trial = tl.div_rn(largest * 0 + tl.load(numerators + step), largest)
        width, error = tl.div_rn(largest * 0 + 1.0, trial), largest * 0
        for i in range(n):
            v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
            off = v - width * tl.minimum(rounded(trial * v), TOP * 1.0)
            error += w * off * off
        plain = step == 0
        take = plain | (error < best)
        used, best = tl.where(take, trial, used), tl.where(take, error, best)
    sum_lx, sum_l2 = largest * 0, largest * 0
    for i in range(n):
        v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
        code = tl.minimum(nearest(used * v), TOP)
        tl.store(codes + base + i, tl.where(dead, 0, code), mask=live)
        sum_lx += w * v * code.to(tl.float32)
        sum_l2 += w * code.to(tl.float32) * code.to(tl.float32)
    for _ in range(5):
        for i in range(n):
            v, w = tl.load(x + base + i, mask=live, other=0.0), tl.load(weight + base + i, mask=live, other=0.0)
            code = tl.load(codes + base + i, mask=live, other=0)
            lx = sum_lx - w * v * code.to(tl.float32)
            l2 = sum_l2 - w * code.to(tl.float32) * code.to(tl.float32)
            new = tl.minimum(nearest(tl.div_rn(v * l2, lx)), TOP)
            more_lx = lx + w * v * new.to(tl.float32)
            more_l2 = l2 + w * new.to(tl.float32) * new.to(tl.float32)
            take = (lx > 0) & (l2 > 0) & (new != code) & ~dead
            take = take & (more_lx * more_lx * sum_l2 > sum_lx * sum_lx * more_l2)
            tl.store(codes + base + i, tl.where(take, new, code), mask=live)
            sum_lx, sum_l2 = tl.where(take, more_lx, sum_lx), tl.where(take, more_l2, sum_l2)
    found = tl.where(sum_l2 > 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    tl.store(scale + lane, tl.where(dead, 0.0, found), mask=live)


@triton.jit
def descent_fit(x, scale, codes, count, n, LANES: tl.constexpr):
    """Q3_K without importance: scale of each group and codes 0 … 7, int32 (count, n), improved one after the other."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < count
    base = lane * n
    peak = first_peak(x, base, n, live, LANES)
    trial = tl.div_rn(peak * 0 - 4.0, peak)
    sum_lx, sum_l2 = peak * 0, peak * 0
    for i in range(n):
        v = tl.load(x + base + i, mask=live, other=0.0)
        code = clamped(rounded(trial * v), -4.0, 3.0)
        w = v * v
        sum_lx += w * v * code
        sum_l2 += w * code * code
        tl.store(codes + base + i, code.to(tl.int32), mask=live)
    for _ in range(5):
        for i in range(n):
            v = tl.load(x + base + i, mask=live, other=0.0)
            code = tl.load(codes + base + i, mask=live, other=0).to(tl.float32)
            w = v * v
            lx, l2 = sum_lx - w * v * code, sum_l2 - w * code * code
            new = clamped(nearest(tl.div_rn(v * l2, lx)).to(tl.float32), -4.0, 3.0)
            more_lx, more_l2 = lx + w * v * new, l2 + w * new * new
            take = (lx > 0) & (new != code) & (more_l2 > 0)
            take = take & (more_lx * more_lx * sum_l2 > sum_lx * sum_lx * more_l2)
            tl.store(codes + base + i, tl.where(take, new, code).to(tl.int32), mask=live)
            sum_lx, sum_l2 = tl.where(take, more_lx, sum_lx), tl.where(take, more_l2, sum_l2)
    dead = tl.abs(peak) < TINY
    for i in range(n):
        code = tl.load(codes + base + i, mask=live, other=0)
        tl.store(codes + base + i, tl.where(dead, 0, code + 4), mask=live)
    tl.store(scale + lane, tl.where(dead | ~(sum_l2 > 0), 0.0, tl.div_rn(sum_lx, sum_l2)), mask=live)
