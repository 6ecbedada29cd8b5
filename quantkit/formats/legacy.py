"""ggml's 32-weight formats: a half-precision scale (and minimum) per block.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_q4_0 and its neighbours).
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import F32, Format


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """(n, 16) bytes → (n, 32) codes: low nibbles are the first half of the block."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(qh: np.ndarray) -> np.ndarray:
    """(n, 4) bytes → (n, 32): bit j of the little-endian word belongs to code j, moved to bit 4."""
    bits = np.unpackbits(np.ascontiguousarray(qh), axis=1, bitorder="little")
    return bits << 4


class Q4_0(Format):
    """w = d · (q − 8), q in 0…15."""

    name, gguf_id, elements = "Q4_0", 2, 32
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    @classmethod
    def _decode_blocks(cls, blocks):
        q = _nibbles(blocks["qs"]).astype(np.int8) - 8  # (n, 32)
        return blocks["d"].astype(F32)[:, None] * q.astype(F32)


class Q4_1(Format):
    """w = d · q + m, q in 0…15."""

    name, gguf_id, elements, symmetric = "Q4_1", 3, 32, False
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])

    @classmethod
    def _decode_blocks(cls, blocks):
        q = _nibbles(blocks["qs"]).astype(F32)
        return blocks["d"].astype(F32)[:, None] * q + blocks["m"].astype(F32)[:, None]


class Q5_0(Format):
    """w = d · (q − 16), q in 0…31 with the fifth bits apart."""

    name, gguf_id, elements = "Q5_0", 6, 32
    layout = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])

    @classmethod
    def _decode_blocks(cls, blocks):
        q = (_nibbles(blocks["qs"]) | _fifth_bits(blocks["qh"])).astype(np.int8) - 16
        return blocks["d"].astype(F32)[:, None] * q.astype(F32)


class Q5_1(Format):
    """w = d · q + m, q in 0…31 with the fifth bits apart."""

    name, gguf_id, elements, symmetric = "Q5_1", 7, 32, False
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])

    @classmethod
    def _decode_blocks(cls, blocks):
        q = (_nibbles(blocks["qs"]) | _fifth_bits(blocks["qh"])).astype(F32)
        return blocks["d"].astype(F32)[:, None] * q + blocks["m"].astype(F32)[:, None]


class Q8_0(Format):
    """w = d · q, q a signed byte."""

    name, gguf_id, elements = "Q8_0", 8, 32
    layout = np.dtype([("d", "<f2"), ("qs", "i1", 32)])

    @classmethod
    def _decode_blocks(cls, blocks):
        return blocks["d"].astype(F32)[:, None] * blocks["qs"].astype(F32)
