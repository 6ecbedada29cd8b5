"""Unquantized formats: F32, F16 and BF16."""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format


class F32(Format):
    """IEEE 754 single precision."""

    name, gguf_id = "F32", 0
    uses_importance = False
    layout = np.dtype([("x", "<f4")])
    containers, offered = ("gguf", "safetensors"), False
    float_bits = (8, 23)
    advice = "Norms, biases and other tensors that llama.cpp never quantizes."

    @classmethod
    def decode_blocks(cls, blocks):
        return blocks["x"].astype(np.float32)


class F16(Format):
    """IEEE 754 half precision."""

    name, gguf_id = "F16", 1
    uses_importance = False
    layout = np.dtype([("x", "<f2")])
    containers, offered = ("gguf", "safetensors"), False
    float_bits = (5, 10)
    advice = "What rows become that fit no block; exact for checkpoints in half precision."

    @classmethod
    def decode_blocks(cls, blocks):
        return blocks["x"].astype(np.float32)


class BF16(Format):
    """bfloat16: the upper half of a single-precision number."""

    name, gguf_id = "BF16", 30
    uses_importance = False
    layout = np.dtype([("x", "<u2")])
    containers, offered = ("gguf", "safetensors"), False
    float_bits = (8, 7)
    advice = "The original's own precision for most checkpoints."

    @classmethod
    def decode_blocks(cls, blocks):
        bits = blocks["x"].astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
