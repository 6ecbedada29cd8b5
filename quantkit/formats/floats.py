"""Unquantized formats: F32, F16 and BF16."""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format


class F32(Format):
    """IEEE 754 single precision."""

    name, gguf_id = "F32", 0
    layout = np.dtype([("x", "<f4")])
    containers = ("gguf", "safetensors")

    @classmethod
    def _decode_blocks(cls, blocks):
        return blocks["x"].astype(np.float32)


class F16(Format):
    """IEEE 754 half precision."""

    name, gguf_id = "F16", 1
    layout = np.dtype([("x", "<f2")])
    containers = ("gguf", "safetensors")

    @classmethod
    def _decode_blocks(cls, blocks):
        return blocks["x"].astype(np.float32)


class BF16(Format):
    """bfloat16: the upper half of a single-precision number."""

    name, gguf_id = "BF16", 30
    layout = np.dtype([("x", "<u2")])
    containers = ("gguf", "safetensors")

    @classmethod
    def _decode_blocks(cls, blocks):
        bits = blocks["x"].astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
