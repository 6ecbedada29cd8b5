"""ggml's K-quants: super-blocks of 256 weights whose sub-block scales are themselves quantized.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_q2_K … block_q6_K).
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format
from quantkit.formats.layout import Integers, Linear, ScaleRule, at, joined, over, signed

SUPER = 256
TWO_BITS = at("qs", 2, run=32)  # each 32 bytes hold four groups of 32 codes, two bits apart
FOUR_BITS = at("qs", 4, run=32)


def six_bits(first: int) -> Integers:
    """Eight integers of 6 bits as Q4_K and Q5_K keep them: scales (first 0) and minimums (first 4).

    Of the twelve bytes, 0…3 hold the first four scales and, above, the two high bits of the last four;
    4…7 the same for the minimums; 8…11 the low nibbles of the last four scales and minimums.
    """
    own = (first, first + 4, 1)
    return joined(
        at("scales", 6, count=1, words=own),
        over(at("scales", 4, count=1, first=first, words=(8, 12, 1)), at("scales", 2, count=1, first=6, words=own)),
    )


class Q2_K(Format):
    """w = (d·sc)·q − (dmin·mn); 16 sub-blocks of 16, 4-bit scales and minimums, q in 0…3."""

    name, gguf_id, elements, fallback = "Q2_K", 10, SUPER, "Q4_0"
    layout = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
    codes, block_minimum, minimum_sign = TWO_BITS, "dmin", -1
    scales, minimums = at("scales", 4, count=1), at("scales", 4, count=1, first=4)
    advice = "The fastest format below 3 bits; IQ2_S is smaller and about as good with activation statistics."


class Q3_K(Format):
    """w = (d·sc)·q; 16 sub-blocks of 16, 6-bit signed scales, q in −4…3 with the high bits apart."""

    name, gguf_id, elements, fallback = "Q3_K", 11, SUPER, "Q4_0"
    layout = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
    codes, values = over(TWO_BITS, at("hmask", 1, run=32)), Linear(4)
    scales = over(at("scales", 4, run=8, words=(0, 8, 1)), at("scales", 2, run=4, words=(8, 12, 1)))
    scale_rule = ScaleRule(offset=-32)
    advice = "3.4 bits where decoding must be fast; IQ3_S is better at the same size."


class Q4_K(Format):
    """w = (d·sc)·q − (dmin·mn); 8 sub-blocks of 32, 6-bit scales and minimums, q in 0…15."""

    name, gguf_id, elements, fallback = "Q4_K", 12, SUPER, "Q5_0"
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
    codes, block_minimum, minimum_sign = FOUR_BITS, "dmin", -1
    scales, minimums = six_bits(0), six_bits(4)
    advice = "The workhorse: small, fast everywhere, little lost."


class Q5_K(Format):
    """As Q4_K with q in 0…31; the fifth bits lie in planes of their own."""

    name, gguf_id, elements, fallback = "Q5_K", 13, SUPER, "Q5_1"
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
    codes, block_minimum, minimum_sign = over(FOUR_BITS, at("qh", 1, run=32)), "dmin", -1
    scales, minimums = six_bits(0), six_bits(4)
    advice = "Attention and down projections of a 4-bit file, or a whole file when memory allows."


class Q6_K(Format):
    """w = (d·sc)·(q − 32); 16 sub-blocks of 16, 8-bit signed scales, q in 0…63."""

    name, gguf_id, elements, fallback = "Q6_K", 14, SUPER, "Q8_0"
    layout = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
    codes, values = over(at("ql", 4, run=64), at("qh", 2, run=32)), Linear(32)
    scales = signed(at("scales", 8))
    advice = "Heads, embeddings and tensors with super weights; nearly lossless."
