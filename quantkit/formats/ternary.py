"""Formats of one, two or three levels, for models that were trained to have no more.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_tq1_0, block_tq2_0, block_q1_0, block_q2_0).
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format
from quantkit.formats.kquants import SUPER
from quantkit.formats.layout import Linear, Table, Trits, at


class TQ1_0(Format):
    """w = d·(q − 1), q in 0…2, five codes to a byte in base three."""

    name, gguf_id, elements, fallback = "TQ1_0", 34, SUPER, "Q4_0"
    uses_importance = False
    layout = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
    codes, values = Trits((("qs", 0, 32, 32, 5), ("qs", 32, 48, 16, 5), ("qh", 0, 4, 4, 4))), Linear(1)
    advice = "Only for models trained with ternary weights (BitNet b1.58, TriLM): there it loses nothing."


class TQ2_0(Format):
    """w = d·(q − 1), q in 0…2, four codes to a byte."""

    name, gguf_id, elements, fallback = "TQ2_0", 35, SUPER, "Q4_0"
    uses_importance = False
    layout = np.dtype([("qs", "u1", 64), ("d", "<f2")])
    codes, values = at("qs", 2, run=32), Linear(1, count=3)
    advice = "As TQ1_0, faster to decode."


class Q2_0(Format):
    """w = d·(q − 1), q in 0…3: −d, 0, d and 2d."""

    name, gguf_id, elements, fallback = "Q2_0", 42, 64, "Q4_0"
    uses_importance = False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    codes, values = at("qs", 2), Linear(1)
    advice = "Only for models trained with these four levels."


class Q1_0(Format):
    """w = ±d, a bit for each sign."""

    name, gguf_id, elements, has_zero = "Q1_0", 41, 128, False
    uses_importance = False
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    codes, values = at("qs", 1), Table((-1, 1))
    advice = "Only for models trained with binary weights."
