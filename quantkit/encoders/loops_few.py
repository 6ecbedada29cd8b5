"""Numba: ggml's encoders without a search: ternary, binary and FP4 formats, to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c (quantize_row_tq1_0_ref and its neighbours) and ggml-impl.h for
the scales of FP4. Importance is not used. Signatures as in loops_kquants.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.encoders.loops_scales import ONE, ZERO
from quantkit.formats.fp4 import E2M1_DOUBLED, MXFP4, NVFP4
from quantkit.formats.grids import table
from quantkit.formats.loops_bits import field_offset, plane_facts, put_half, write_plane
from quantkit.formats.loops_half import OPTIONS, to_half
from quantkit.formats.ternary import Q1_0, Q2_0, TQ1_0, TQ2_0

F32 = np.float32
FP4_VALUES = np.array(E2M1_DOUBLED.entries, F32)
E8M0, UE4M3 = table("e8m0_half"), table("ue4m3_half")
DIGITS = np.array([(field_offset(TQ1_0, f) + a, b - a, run, n) for f, a, b, run, n in TQ1_0.codes.runs])
T1_BYTES, T1_D = TQ1_0.block_bytes(), field_offset(TQ1_0, "d")
T2_BYTES, T2_D, T2_CODES = TQ2_0.block_bytes(), field_offset(TQ2_0, "d"), plane_facts(TQ2_0)[0]
Q1_BYTES, Q1_D, Q1_CODES = Q1_0.block_bytes(), field_offset(Q1_0, "d"), plane_facts(Q1_0)[0]
Q2_BYTES, Q2_D, Q2_CODES = Q2_0.block_bytes(), field_offset(Q2_0, "d"), plane_facts(Q2_0)[0]
MX_BYTES, MX_E, MX_CODES = MXFP4.block_bytes(), field_offset(MXFP4, "e"), plane_facts(MXFP4)[0]
NV_BYTES, NV_D, NV_CODES = NVFP4.block_bytes(), field_offset(NVFP4, "d"), plane_facts(NVFP4)[0]


@njit(inline="always", **OPTIONS)
def largest_magnitude(row, at, n):
    """max |x[at:at+n]|."""
    largest = ZERO
    for i in range(n):
        largest = max(largest, abs(row[at + i]))
    return largest


@njit(inline="always", **OPTIONS)
def round_away(v):
    """Nearest integer, halves away from zero (C's roundf)."""
    whole = np.floor(abs(v))
    whole = whole + ONE if abs(v) - whole >= F32(0.5) else whole
    return np.int32(whole) if v >= ZERO else -np.int32(whole)


@njit(inline="always", **OPTIONS)
def code_steps(row, at, n, top, codes):
    """codes = round(x / max |x|) + 1, at most ``top``; returns the scale."""
    d = largest_magnitude(row, at, n)
    inverse = ONE / d if d > ZERO else ZERO
    for i in range(n):
        codes[i] = min(max(round_away(row[at + i] * inverse) + 1, 0), top)
    return d


@njit(**OPTIONS)
def encode_tq1_0(x, importance, weighted, out):
    """TQ1_0."""
    codes = np.zeros(256, np.int32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 256):
            dst = out[r, T1_BYTES * b : T1_BYTES * (b + 1)]
            put_half(dst, T1_D, to_half(code_steps(x[r], 256 * b, 256, 2, codes)))
            first = 0
            for k in range(DIGITS.shape[0]):
                at, length, run, digits = DIGITS[k, 0], DIGITS[k, 1], DIGITS[k, 2], DIGITS[k, 3]
                for c in range(length // run):
                    for i in range(run):
                        value = 0
                        for n in range(5):
                            value = 3 * value + (codes[first + run * n + i] if n < digits else 0)
                        dst[at + run * c + i] = np.uint8((value * 256 + 242) // 243)
                    first += run * digits


@njit(**OPTIONS)
def encode_tq2_0(x, importance, weighted, out):
    """TQ2_0."""
    codes = np.zeros(256, np.int32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 256):
            dst = out[r, T2_BYTES * b : T2_BYTES * (b + 1)]
            put_half(dst, T2_D, to_half(code_steps(x[r], 256 * b, 256, 2, codes)))
            write_plane(codes, dst, *T2_CODES)


@njit(**OPTIONS)
def encode_q2_0(x, importance, weighted, out):
    """Q2_0."""
    codes = np.zeros(64, np.int32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 64):
            dst = out[r, Q2_BYTES * b : Q2_BYTES * (b + 1)]
            put_half(dst, Q2_D, to_half(code_steps(x[r], 64 * b, 64, 3, codes)))
            write_plane(codes, dst, *Q2_CODES)


@njit(**OPTIONS)
def encode_q1_0(x, importance, weighted, out):
    """Q1_0: the scale is the mean magnitude."""
    codes = np.zeros(128, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 128):
            at, dst = 128 * b, out[r, Q1_BYTES * b : Q1_BYTES * (b + 1)]
            total = ZERO
            for i in range(128):
                total += abs(row[at + i])
                codes[i] = 1 if row[at + i] >= ZERO else 0
            put_half(dst, Q1_D, to_half(total / F32(128)))
            write_plane(codes, dst, *Q1_CODES)


@njit(inline="always", **OPTIONS)
def fp4_codes(row, at, n, d, codes, to):
    """Nearest of the sixteen numbers value · d, the first of equals."""
    for i in range(n):
        best, chosen = abs(FP4_VALUES[0] * d - row[at + i]), 0
        for k in range(1, 16):
            error = abs(FP4_VALUES[k] * d - row[at + i])
            if error < best:
                best, chosen = error, k
        codes[to + i] = chosen


@njit(inline="always", **OPTIONS)
def exponent_of(value):
    """floor(log2(value)) of a positive number as C's log2f rounds it: one below a power of two it may round up."""
    return np.int32(np.floor(F32(np.log2(value))))


@njit(**OPTIONS)
def encode_mxfp4(x, importance, weighted, out):
    """MXFP4: the scale is two powers of two below the largest magnitude."""
    codes = np.zeros(32, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 32):
            at, dst = 32 * b, out[r, MX_BYTES * b : MX_BYTES * (b + 1)]
            largest = largest_magnitude(row, at, 32)
            e = np.uint8((exponent_of(largest) - 2 + 127) & 255) if largest > ZERO else np.uint8(0)
            dst[MX_E] = e
            fp4_codes(row, at, 32, E8M0[e], codes, 0)
            write_plane(codes, dst, *MX_CODES)


@njit(inline="always", **OPTIONS)
def to_ue4m3(value):
    """A positive number as unsigned E4M3: halves round up, at most 448."""
    if not value > ZERO:
        return 0
    value = min(value, F32(448))
    bits = np.int64(F32(value).view(np.uint32))
    exponent, mantissa = ((bits >> 23) & 255) - 120, (bits >> 20) & 7
    if exponent <= 0:
        return min(np.int64(value * F32(512) + F32(0.5)), 7)
    if exponent >= 15:
        return 0x7E
    mantissa += (bits >> 19) & 1
    if mantissa > 7:
        mantissa = np.int64(0)
        exponent += 1
        if exponent >= 15:
            return 0x7E
    return (exponent << 3) | mantissa


@njit(**OPTIONS)
def encode_nvfp4(x, importance, weighted, out):
    """NVFP4: 4 sub-blocks of 16, each scaled so that its largest magnitude becomes 6."""
    codes = np.zeros(64, np.int32)
    for r in range(x.shape[0]):
        row = x[r]
        for b in range(x.shape[1] // 64):
            dst = out[r, NV_BYTES * b : NV_BYTES * (b + 1)]
            for s in range(4):
                at = 64 * b + 16 * s
                scale = to_ue4m3(largest_magnitude(row, at, 16) / F32(6))
                dst[NV_D + s] = np.uint8(scale)
                fp4_codes(row, at, 16, UE4M3[scale], codes, 16 * s)
            write_plane(codes, dst, *NV_CODES)
