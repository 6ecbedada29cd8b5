"""ggml's K-quants: super-blocks of 256 weights whose sub-block scales are themselves quantized.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_q2_K … block_q6_K).
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import F32, Format

SUPER = 256


def _two_bit_planes(qs: np.ndarray) -> np.ndarray:
    """(n, 64) bytes → (n, 256) codes: each 32 bytes hold four groups of 32 codes, two bits apart."""
    halves = qs.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return ((halves >> shifts) & 3).reshape(-1, SUPER)


def _four_bit_planes(qs: np.ndarray) -> np.ndarray:
    """(n, 128) bytes → (n, 256) codes: each 32 bytes hold two groups of 32 codes, four bits apart."""
    quarters = qs.reshape(-1, 4, 1, 32)
    shifts = np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    return ((quarters >> shifts) & 15).reshape(-1, SUPER)


def unpack_scales_k4(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes → eight 6-bit scales and eight 6-bit minimums, as Q4_K and Q5_K store them.

    scales: uint8 (n, 12). Returns two uint8 arrays (n, 8).
    """
    a, b, c = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    sc = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    mn = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return sc, mn


def _affine(d: np.ndarray, dmin: np.ndarray, sc: np.ndarray, mn: np.ndarray, q: np.ndarray) -> np.ndarray:
    """w = (d·sc)·q − (dmin·mn) per sub-block. d, dmin: (n,); sc, mn: (n, g); q: (n, 256)."""
    scale = d.astype(F32)[:, None] * sc.astype(F32)
    minimum = dmin.astype(F32)[:, None] * mn.astype(F32)
    grouped = q.reshape(len(q), sc.shape[1], SUPER // sc.shape[1]).astype(F32)
    return (scale[:, :, None] * grouped - minimum[:, :, None]).reshape(len(q), SUPER)


class Q2_K(Format):
    """w = (d·sc)·q − (dmin·mn); 16 sub-blocks of 16, 4-bit scales and minimums, q in 0…3."""

    name, gguf_id, elements, symmetric, fallback = "Q2_K", 10, SUPER, False, "Q4_0"
    layout = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])

    @classmethod
    def _decode_blocks(cls, blocks):
        q = _two_bit_planes(blocks["qs"])
        return _affine(blocks["d"], blocks["dmin"], blocks["scales"] & 15, blocks["scales"] >> 4, q)


class Q3_K(Format):
    """w = (d·sc)·q; 16 sub-blocks of 16, 6-bit signed scales, q in −4…3 with the high bits apart."""

    name, gguf_id, elements, fallback = "Q3_K", 11, SUPER, "Q4_0"
    layout = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])

    @classmethod
    def _decode_blocks(cls, blocks):
        low = _two_bit_planes(blocks["qs"]).astype(np.int8)
        bit = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
        high = ((blocks["hmask"][:, None, :] >> bit) & 1).reshape(-1, SUPER)  # set means: subtract nothing
        q = low - np.where(high, 0, 4).astype(np.int8)
        s = blocks["scales"]  # (n, 12): eight bytes of low nibbles, four of high bit pairs
        nibbles = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
        pairs = np.concatenate([(s[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
        sc = (nibbles | (pairs << 4)).astype(np.int8) - 32  # (n, 16)
        scale = blocks["d"].astype(F32)[:, None] * sc.astype(F32)
        return (scale[:, :, None] * q.reshape(-1, 16, 16).astype(F32)).reshape(-1, SUPER)


class Q4_K(Format):
    """w = (d·sc)·q − (dmin·mn); 8 sub-blocks of 32, 6-bit scales and minimums, q in 0…15."""

    name, gguf_id, elements, symmetric, fallback = "Q4_K", 12, SUPER, False, "Q5_0"
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])

    @classmethod
    def _decode_blocks(cls, blocks):
        sc, mn = unpack_scales_k4(blocks["scales"])
        return _affine(blocks["d"], blocks["dmin"], sc, mn, _four_bit_planes(blocks["qs"]))


class Q5_K(Format):
    """As Q4_K with q in 0…31; the fifth bits lie in planes of their own."""

    name, gguf_id, elements, symmetric, fallback = "Q5_K", 13, SUPER, False, "Q5_1"
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])

    @classmethod
    def _decode_blocks(cls, blocks):
        sc, mn = unpack_scales_k4(blocks["scales"])
        bit = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
        fifth = ((blocks["qh"][:, None, :] >> bit) & 1).reshape(-1, SUPER) << 4
        return _affine(blocks["d"], blocks["dmin"], sc, mn, _four_bit_planes(blocks["qs"]) | fifth)


class Q6_K(Format):
    """w = (d·sc)·(q − 32); 16 sub-blocks of 16, 8-bit signed scales, q in 0…63."""

    name, gguf_id, elements, fallback = "Q6_K", 14, SUPER, "Q8_0"
    layout = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])

    @classmethod
    def _decode_blocks(cls, blocks):
        ql = blocks["ql"].reshape(-1, 2, 1, 64)  # per 128 weights: 64 low nibbles, then 64 high ones
        low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(-1, SUPER)
        high = _two_bit_planes(blocks["qh"])
        q = (low | (high << 4)).astype(np.int8) - 32
        scale = blocks["d"].astype(F32)[:, None] * blocks["scales"].astype(F32)
        return (scale[:, :, None] * q.reshape(-1, 16, 16).astype(F32)).reshape(-1, SUPER)
