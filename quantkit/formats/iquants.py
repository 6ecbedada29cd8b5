"""ggml's I-quants that quantkit writes so far: IQ4_XS and IQ3_S.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_iq4_xs, block_iq3_s).
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import F32, Format
from quantkit.formats.grids import IQ4_VALUES, grid
from quantkit.formats.kquants import SUPER


class IQ4_XS(Format):
    """w = (d·(sc − 32))·value[q]; 8 sub-blocks of 32, 6-bit scales, 16 fixed values."""

    name, gguf_id, elements, fallback, has_zero = "IQ4_XS", 23, SUPER, "F16", False
    layout = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])

    @classmethod
    def _decode_blocks(cls, blocks):
        low = np.stack([blocks["scales_l"] & 15, blocks["scales_l"] >> 4], axis=2).reshape(-1, 8)
        high = (blocks["scales_h"][:, None] >> (2 * np.arange(8, dtype=np.uint16))) & 3
        scale = blocks["d"].astype(F32)[:, None] * ((low | (high << 4)).astype(np.int32) - 32).astype(F32)
        qs = blocks["qs"].reshape(-1, 8, 16)
        values = IQ4_VALUES[np.concatenate([qs & 15, qs >> 4], axis=2)].astype(F32)  # (n, 8, 32)
        return (scale[:, :, None] * values).reshape(-1, SUPER)


class IQ3_S(Format):
    """w = ±(d·(1 + 2·sc))·grid; 8 sub-blocks of 32, 4-bit scales, groups of four from a code book of 512."""

    name, gguf_id, elements, fallback, has_zero = "IQ3_S", 21, SUPER, "F16", False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])

    @classmethod
    def _decode_blocks(cls, blocks):
        high = np.unpackbits(np.ascontiguousarray(blocks["qh"]), axis=1, bitorder="little").astype(np.uint16)  # (n, 64)
        magnitude = grid("iq3_s")[blocks["qs"].astype(np.uint16) | (high << 8)].reshape(-1, 8, 32).astype(F32)
        negative = np.unpackbits(np.ascontiguousarray(blocks["signs"]), axis=1, bitorder="little").reshape(-1, 8, 32)
        sc = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], axis=2).reshape(-1, 8)
        scale = blocks["d"].astype(F32)[:, None] * (1 + 2 * sc.astype(np.int32)).astype(F32)
        return (scale[:, :, None] * magnitude * np.where(negative, F32(-1), F32(1))).reshape(-1, SUPER)
