"""Numba: ggml's encoders of IQ4_XS and IQ3_S, to the bit.

Source: llama.cpp, ggml/src/ggml-quants.c (quantize_row_iq4_nl_impl, quantize_row_iq3_s_impl, iq3xs_init_impl).
Signatures as in loops_kquants. Candidate scales are the lanes of IQ4_XS, as in symmetric_search.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.encoders.loops_kquants import field_offsets, mean_square, put_half
from quantkit.encoders.loops_scales import ONE, OPTIONS, TINY, ZERO, clamp, first_peak, nearest, to_half
from quantkit.formats.grids import IQ4_VALUES, grid
from quantkit.formats.iquants import IQ3_S, IQ4_XS

VALUES = IQ4_VALUES.astype(np.float32)
MIDDLES = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
STEPS = VALUES[1:] - VALUES[:-1]
XS_BYTES, S3_BYTES = IQ4_XS.block_bytes(), IQ3_S.block_bytes()
XS, S3 = field_offsets(IQ4_XS), field_offsets(IQ3_S)
XS_HIGH, XS_LOW, XS_QS = XS["scales_h"], XS["scales_l"], XS["qs"]
S3_QS, S3_QH, S3_SIGNS, S3_SCALES = S3["qs"], S3["qh"], S3["signs"], S3["scales"]

GRID = grid("iq3_s").astype(np.float32)  # (512, 4)
WANTED = 3  # distances to the code book that count as neighbours of a point off it


def _neighbours() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each of 8⁴ points lies: entry of the code book or −1; start and entries of its neighbours.

    Neighbours are the entries at the WANTED smallest squared distances, nearest first, ties by number.
    """
    points = np.stack([(np.arange(4096) >> (3 * k)) & 7 for k in range(4)], axis=1) * 2 + 1  # (4096, 4)
    codes = ((GRID.astype(np.int64) - 1) // 2) @ np.array([1, 8, 64, 512])
    index = np.full(4096, -1, np.int32)
    index[codes] = np.arange(512)
    start, entries = np.zeros(4097, np.int32), []
    for point in range(4096):
        if index[point] < 0:
            distance = ((GRID.astype(np.int64) - points[point]) ** 2).sum(1)
            limit = np.unique(distance)[:WANTED][-1]
            order = np.lexsort((np.arange(512), distance))
            entries.append(order[distance[order] <= limit])
        start[point + 1] = start[point] + (len(entries[-1]) if index[point] < 0 else 0)
    return index, start, np.concatenate(entries).astype(np.int32)


INDEX, START, ENTRIES = _neighbours()


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
            high = 0
            for j in range(8):
                sc = clamp(nearest(inverse * scales[j]), -32, 31)
                step = d * np.float32(sc)
                back = ONE / step if step != ZERO else ZERO
                for i in range(32):
                    codes[32 * j + i] = nearest_value(back * row[at + 32 * j + i])
                code = sc + 32
                high |= (code >> 4) << (2 * j)
                if j % 2 == 0:
                    dst[o + XS_LOW + j // 2] = np.uint8(code & 15)
                else:
                    dst[o + XS_LOW + j // 2] |= np.uint8((code & 15) << 4)
            put_half(dst, o, to_half(d))
            put_half(dst, o + XS_HIGH, high)
            for j in range(8):
                for i in range(16):
                    dst[o + XS_QS + 16 * j + i] = np.uint8(codes[32 * j + i] | (codes[32 * j + 16 + i] << 4))


@njit(**OPTIONS)
def grid_entry(xval, w, k, inverse, scale, codes):
    """Entry of the code book for the four weights from 4k on; codes[4k:4k+4] become its codes.

    The rounded point itself if it is on the code book (returns it), else the best of its neighbours
    (returned as −1 − entry).
    """
    point = 0
    for i in range(4):
        code = clamp(nearest(np.float32(0.5) * (inverse * xval[4 * k + i] - ONE)), 0, 7)
        codes[4 * k + i] = code
        point |= code << (3 * i)
    if INDEX[point] >= 0:
        return INDEX[point]
    best, chosen = np.float32(3.4028234663852886e38), -1
    for n in range(START[point], START[point + 1]):
        entry = ENTRIES[n]
        distance = ZERO
        for i in range(4):
            diff = scale * GRID[entry, i] - xval[4 * k + i]
            distance += w[4 * k + i] * diff * diff
        if distance < best:
            best, chosen = distance, entry
    for i in range(4):
        codes[4 * k + i] = (np.int32(GRID[chosen, i]) - 1) // 2
    return -1 - chosen


@njit(**OPTIONS)
def line_through(xval, w, codes):
    """(Σ w·x·q, Σ w·q²) with q = 2·code + 1, in order."""
    sum_qx, sum_q2 = ZERO, ZERO
    for i in range(32):
        q = np.float32(2 * codes[i] + 1)
        sum_qx += w[i] * xval[i] * q
        sum_q2 += w[i] * q * q
    return sum_qx, sum_q2


@njit(**OPTIONS)
def iq3_scale(xval, w, root, largest, codes, trial):
    """Scale and codes of 32 magnitudes: the best of 19 inverse scales, then once more off the code book."""
    best, scale = ZERO, largest / np.float32(15)
    for i in range(32):
        codes[i] = 0
    off = True
    for step in range(-9, 10):
        inverse = (np.float32(15) + np.float32(step) * np.float32(0.2)) / largest
        this_scale = ONE / inverse
        any_off = False
        for k in range(8):
            if grid_entry(xval, root, k, inverse, this_scale, trial) < 0:
                any_off = True
        sum_qx, sum_q2 = line_through(xval, w, trial)
        if sum_q2 > ZERO and sum_qx * sum_qx > best * sum_q2:
            scale = sum_qx / sum_q2
            best = scale * sum_qx
            for i in range(32):
                codes[i] = trial[i]
            off = any_off
    if off and scale > ZERO:
        inverse = ONE / scale
        for k in range(8):
            grid_entry(xval, root, k, inverse, scale, codes)
        sum_qx, sum_q2 = line_through(xval, w, codes)
        if sum_q2 > ZERO:
            scale = sum_qx / sum_q2
    return scale


@njit(**OPTIONS)
def encode_iq3_s(x, importance, weighted, out):
    """IQ3_S. A sub-block of zeros does not advance the position of the next one, as in ggml."""
    xval, w, root = np.empty(32, np.float32), np.empty(32, np.float32), np.empty(32, np.float32)
    codes, trial = np.zeros(32, np.int32), np.zeros(32, np.int32)
    scales = np.empty(8, np.float32)
    for r in range(x.shape[0]):
        row, dst = x[r], out[r]
        for b in range(x.shape[1] // 256):
            at, o = 256 * b, S3_BYTES * b
            dst[o : o + S3_BYTES] = 0
            sigma2 = np.float32(2) * mean_square(row, at, 256)
            place, top = 0, ZERO
            for j in range(8):
                s = at + 32 * j
                largest = ZERO
                for i in range(32):
                    v = row[s + i]
                    w[i] = importance[s + i] * np.sqrt(sigma2 + v * v) if weighted else v * v
                    root[i] = np.sqrt(w[i])
                    xval[i] = abs(v)
                    largest = max(largest, xval[i])
                scales[j] = ZERO
                if largest == ZERO:
                    continue
                scale = iq3_scale(xval, w, root, largest, codes, trial)
                flip = scale < ZERO
                scales[j] = abs(scale)
                top = max(top, scales[j])
                for k in range(8):
                    point = 0
                    for i in range(4):
                        point |= codes[4 * k + i] << (3 * i)
                    entry = INDEX[point]
                    dst[o + S3_QS + 8 * place + k] = np.uint8(entry & 255)
                    dst[o + S3_QH + j] |= np.uint8((entry >> 8) << k)
                for k in range(4):
                    bits = 0
                    for i in range(8):
                        bits |= (1 if (row[s + 8 * k + i] < ZERO) != flip else 0) << i
                    dst[o + S3_SIGNS + 4 * place + k] = np.uint8(bits)
                place += 1
            if top == ZERO:
                continue
            d = top / np.float32(31)
            put_half(dst, o, to_half(d * np.float32(1.033)))
            inverse = ONE / d
            for j in range(0, 8, 2):
                first = clamp(nearest(np.float32(0.5) * (inverse * scales[j] - ONE)), 0, 15)
                second = clamp(nearest(np.float32(0.5) * (inverse * scales[j + 1] - ONE)), 0, 15)
                dst[o + S3_SCALES + j // 2] = np.uint8(first | (second << 4))
