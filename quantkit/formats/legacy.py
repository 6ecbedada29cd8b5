"""ggml's 32-weight formats: a half-precision scale (and minimum) for each block.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_q4_0 and its neighbours).
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format
from quantkit.formats.layout import Linear, at, over, signed

NIBBLES = at("qs", 4, run=16)  # low nibbles are the first half of the block
FIFTH = at("qh", 1)  # bit j of the little-endian word belongs to code j


class Q4_0(Format):
    """w = d · (q − 8), q in 0…15."""

    name, gguf_id, elements = "Q4_0", 2, 32
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    codes, values = NIBBLES, Linear(8)
    advice = "Rows that are no multiple of 256, or very old readers; Q4_K is better at the same size."


class Q4_1(Format):
    """w = d · q + m, q in 0…15."""

    name, gguf_id, elements = "Q4_1", 3, 32
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
    codes, block_minimum = NIBBLES, "m"
    advice = "Rows that are no multiple of 256 whose weights are not centred on zero."


class Q5_0(Format):
    """w = d · (q − 16), q in 0…31 with the fifth bits apart."""

    name, gguf_id, elements = "Q5_0", 6, 32
    layout = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    codes, values = over(NIBBLES, FIFTH), Linear(16)
    advice = "What Q4_K becomes where rows are no multiple of 256."


class Q5_1(Format):
    """w = d · q + m, q in 0…31 with the fifth bits apart."""

    name, gguf_id, elements = "Q5_1", 7, 32
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    codes, block_minimum = over(NIBBLES, FIFTH), "m"
    advice = "What Q5_K becomes where rows are no multiple of 256."


class Q8_0(Format):
    """w = d · q, q a signed byte."""

    name, gguf_id, elements = "Q8_0", 8, 32
    uses_importance = False
    layout = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
    codes = signed(at("qs", 8))
    advice = "As good as the original for almost any purpose; routers, heads and other small sensitive tensors."
