"""Numba: ggml's encoders of IQ4_NL and IQ4_XS, 16 unevenly spaced values, to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c (quantize_row_iq4_nl_impl). Signatures as in loops_kquants.
Candidate scales are the lanes, as in symmetric_search.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.encoders.loops_scales import ONE, TINY, ZERO, clamp, first_peak, mean_square, nearest
from quantkit.formats.iquants import IQ4_NL, IQ4_XS, UNEVEN
from quantkit.formats.loops_bits import field_offset, pieces, plane_facts, put_half, store, write_plane
from quantkit.formats.loops_half import OPTIONS, to_half

VALUES = np.array(UNEVEN.entries, np.float32)
MIDDLES = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
STEPS = VALUES[1:] - VALUES[:-1]
XS_BYTES, XS_D, XS_CODES, XS_SCALES = (
    IQ4_XS.block_bytes(),
    field_offset(IQ4_XS, "d"),
    plane_facts(IQ4_XS)[0],
    pieces(IQ4_XS.scales, IQ4_XS),
)
NL_BYTES, NL_D, NL_CODES = IQ4_NL.block_bytes(), field_offset(IQ4_NL, "d"), plane_facts(IQ4_NL)[0]


@njit(**OPTIONS)
def nearest_value(x):
    """Number of the fixed value nearest to x (the upper one of a tie, as ggml decides)."""
    code = 0
    for k in range(15):
        code += 1 if x >= MIDDLES[k] else 0
    return code


@njit(**OPTIONS)
def iq4_scale(x, at, w, acc):
    """Scale of 32 weights: the best of 16 inverse scales. acc: float32 scratch (3, 32)."""
    peak = first_peak(x, at, 32)
    if abs(peak) < TINY:
        return ZERO
    inv, sum_qx, sum_q2 = acc[0], acc[1], acc[2]
    for s in range(16):  # lane 0 is the plain maximum, then −7 … 7
        inv[s] = ONE / (-peak / VALUES[0]) if s == 0 else (np.float32(s - 8) + VALUES[0]) / peak
        sum_qx[s] = ZERO
        sum_q2[s] = ZERO
    for i in range(32):
        v, wi = x[at + i], w[i]
        for s in range(16):
            scaled = inv[s] * v
            q = VALUES[0]
            for k in range(15):
                q += STEPS[k] if scaled >= MIDDLES[k] else ZERO
            wq = wi * q
            sum_qx[s] += wq * v
            sum_q2[s] += wq * q
    d = sum_qx[0] / sum_q2[0] if sum_q2[0] > ZERO else ZERO
    best = d * sum_qx[0]
    for s in range(1, 16):
        if sum_q2[s] > ZERO and sum_qx[s] * sum_qx[s] > best * sum_q2[s]:
            d = sum_qx[s] / sum_q2[s]
            best = d * sum_qx[s]
    return d


@njit(**OPTIONS)
def encode_iq4_xs(x, importance, weighted, out):
    """IQ4_XS."""
    acc, w = np.empty((3, 32), np.float32), np.empty(32, np.float32)
    scales, codes = np.empty(8, np.float32), np.zeros(256, np.int32)
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        for b in range(x.shape[1] // 256):
            at, o = 256 * b, XS_BYTES * b
            dst[o : o + XS_BYTES] = 0
            sigma2 = np.float32(2) * mean_square(row, at, 256)
            largest, peak = ZERO, ZERO
            for j in range(8):
                s = at + 32 * j
                for i in range(32):
                    v = row[s + i]
                    w[i] = importance[s + i] * np.sqrt(sigma2 + v * v) if weighted else v * v
                scales[j] = iq4_scale(row, s, w, acc)
                if abs(scales[j]) > largest:
                    largest, peak = abs(scales[j]), scales[j]
            d = -peak / np.float32(32)
            inverse = ONE / d if d != ZERO else ZERO
            put_half(dst, o + XS_D, to_half(d))
            block = dst[o : o + XS_BYTES]
            for j in range(8):
                sc = clamp(nearest(inverse * scales[j]), -32, 31)
                step = d * np.float32(sc)
                back = ONE / step if step != ZERO else ZERO
                for i in range(32):
                    codes[32 * j + i] = nearest_value(back * row[at + 32 * j + i])
                store(block, XS_SCALES, j, sc + 32)
            write_plane(codes, block, *XS_CODES)


@njit(**OPTIONS)
def encode_iq4_nl(x, importance, weighted, out):
    """IQ4_NL."""
    acc, w, codes = np.empty((3, 32), np.float32), np.empty(32, np.float32), np.zeros(32, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 32):
            at, dst = 32 * b, out[r, NL_BYTES * b : NL_BYTES * (b + 1)]
            sigma2 = np.float32(2) * mean_square(row, at, 32)
            for i in range(32):
                v = row[at + i]
                w[i] = importance[at + i] * np.sqrt(sigma2 + v * v) if weighted else v * v
            d = iq4_scale(row, at, w, acc)
            inverse = ONE / d if d != ZERO else ZERO
            for i in range(32):
                codes[i] = nearest_value(inverse * row[at + i])
            put_half(dst, NL_D, to_half(d))
            write_plane(codes, dst, *NL_CODES)
