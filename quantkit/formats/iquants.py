"""ggml's I-quants: code books of 4 or 8 weights at once, or 16 unevenly spaced values.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_iq1_s … block_iq4_xs). Two structures there pack several
things into one array of words; they have fields of their own here where the bytes allow it.
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format
from quantkit.formats.kquants import SUPER
from quantkit.formats.layout import Grid, ScaleRule, Table, at, over

QUARTER = ScaleRule(offset=0.5, factor=0.25)
ODD = ScaleRule(offset=1, step=2)
# Values of the 4-bit non-linear types. Source: llama.cpp, ggml/src/ggml-common.h, kvalues_iq4nl.
UNEVEN = Table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


class IQ4_NL(Format):
    """w = d·value[q]; 16 fixed values."""

    name, gguf_id, elements, has_zero = "IQ4_NL", 20, 32, False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    codes, values = at("qs", 4, run=16), UNEVEN
    advice = "4.5 bits where rows are no multiple of 256."


class IQ4_XS(Format):
    """w = (d·(sc − 32))·value[q]; 8 sub-blocks of 32, 6-bit scales, 16 fixed values."""

    name, gguf_id, elements, fallback, has_zero = "IQ4_XS", 23, SUPER, "IQ4_NL", False
    layout = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])
    codes, values = at("qs", 4, run=16), UNEVEN
    scales, scale_rule = over(at("scales_l", 4), at("scales_h", 2)), ScaleRule(offset=-32)
    advice = "The best quality at about 4.25 bits; a third of Q4_K's decoding speed on a CPU."


class IQ3_S(Format):
    """w = ±(d·(1 + 2·sc))·grid; 8 sub-blocks of 32, 4-bit scales, fours from a code book of 512."""

    name, gguf_id, elements, fallback, has_zero = "IQ3_S", 21, SUPER, "IQ4_NL", False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
    codes, values = over(at("qs", 8), at("qh", 1)), Grid("iq3_s")
    signs, scales, scale_rule = at("signs", 1), at("scales", 4), ODD
    advice = "The best quality at 3.4 bits; decoding costs more than Q3_K's on a CPU."


class IQ3_XXS(Format):
    """w = ±(d·(½ + sc)·½)·grid; 8 sub-blocks of 32, 4-bit scales, fours from a code book of 256."""

    name, gguf_id, elements, fallback, has_zero = "IQ3_XXS", 18, SUPER, "IQ4_NL", False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("tail", "<u4", 8)])
    codes, values = at("qs", 8), Grid("iq3_xxs")
    signs, scales = at("tail", 7, count=4), at("tail", 4, count=1, first=28)
    scale_rule = ScaleRule(offset=0.5, factor=0.5)
    advice = "3 bits for routed experts and large feed-forward layers."


class IQ2_S(Format):
    """w = ±(d·(½ + sc)·¼)·grid; 16 sub-blocks of 16, 4-bit scales, eights from a code book of 1024."""

    name, gguf_id, elements, fallback, has_zero = "IQ2_S", 22, SUPER, "IQ4_NL", False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
    codes, values = over(at("qs", 8), at("qh", 2)), Grid("iq2_s")
    signs, scales, scale_rule = at("signs", 1), at("scales", 4), QUARTER
    advice = "The best of the 2-bit formats."


class IQ2_XS(Format):
    """w = ±(d·(½ + sc)·¼)·grid; 16 sub-blocks of 16, 4-bit scales, eights from a code book of 512."""

    name, gguf_id, elements, fallback, has_zero = "IQ2_XS", 17, SUPER, "IQ4_NL", False
    needs_importance = True
    layout = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
    codes, values = at("qs", 9, count=1), Grid("iq2_xs")
    signs, scales, scale_rule = at("qs", 7, count=1, first=9), at("scales", 4), QUARTER
    advice = "Routed experts at 2.3 bits; needs activation statistics."


class IQ2_XXS(Format):
    """w = ±(d·(½ + sc)·¼)·grid; 8 sub-blocks of 32, 4-bit scales, eights from a code book of 256."""

    name, gguf_id, elements, fallback, has_zero = "IQ2_XXS", 16, SUPER, "IQ4_NL", False
    needs_importance = True
    layout = np.dtype([("d", "<f2"), ("qs", "<u4", 16)])  # in turn: four indices, then four signs and a scale
    codes, values = at("qs", 8, words=(0, None, 2)), Grid("iq2_xxs")
    signs = at("qs", 7, count=4, words=(1, None, 2))
    scales, scale_rule = at("qs", 4, count=1, first=28, words=(1, None, 2)), QUARTER
    advice = "Routed experts at 2 bits; needs activation statistics."


class IQ1_M(Format):
    """w = (d·(1 + 2·sc))·(grid ± ⅛); 16 sub-blocks of 16, 3-bit scales, eights from a code book of 2048."""

    name, gguf_id, elements, fallback, has_zero = "IQ1_M", 29, SUPER, "IQ4_NL", False
    layout = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
    codes, values = over(at("qs", 8), at("qh", 3, stride=4)), Grid("iq1")
    block_scale = at("scales", 4, count=1, first=12)  # the half-precision scale, a nibble in each word
    scales, scale_rule = at("scales", 3, count=4), ODD
    shifts, shift = at("qh", 1, first=3, stride=4), 0.125
    advice = "The last resort below 2 bits: only routed experts of large models bear it."


class IQ1_S(Format):
    """w = (d·(1 + 2·sc))·(grid ± ⅛); 8 sub-blocks of 32, 3-bit scales, eights from a code book of 2048."""

    name, gguf_id, elements, fallback, has_zero = "IQ1_S", 19, SUPER, "IQ4_NL", False
    needs_importance = True
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
    codes, values = over(at("qs", 8), at("qh", 3, count=4)), Grid("iq1")
    scales, scale_rule = at("qh", 3, count=1, first=12), ODD
    shifts, shift = at("qh", 1, count=1, first=15), 0.125
    advice = "The smallest of the I-quants; IQ1_M is better for 0.2 bits more."
