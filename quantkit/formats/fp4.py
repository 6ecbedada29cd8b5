"""Four-bit floating point (E2M1) with shared scales, as ggml keeps it.

Layouts: llama.cpp, ggml/src/ggml-common.h (block_mxfp4, block_nvfp4); the numbers are those of the OCP
Microscaling Formats specification v1.0. The table holds them doubled, so the scales are halved.
"""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format
from quantkit.formats.layout import Table, at

E2M1_DOUBLED = Table((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))


class MXFP4(Format):
    """w = 2^(e − 128)·value[q]; the scale is a power of two."""

    name, gguf_id, elements = "MXFP4", 39, 32
    uses_importance = False
    layout = np.dtype([("e", "u1"), ("qs", "u1", 16)])
    codes, values, float_bits = at("qs", 4, run=16), E2M1_DOUBLED, (2, 1)
    block_scale, scales, scale_table = None, at("e", 8), "e8m0_half"
    advice = "Models trained in MXFP4 (gpt-oss): there it loses nothing. IQ4_XS is better for all others."


class NVFP4(Format):
    """w = s·value[q]; 4 sub-blocks of 16, each with an unsigned E4M3 scale."""

    name, gguf_id, elements = "NVFP4", 40, 64
    uses_importance = False
    layout = np.dtype([("d", "u1", 4), ("qs", "u1", 32)])
    codes, values, float_bits = at("qs", 4, run=8), E2M1_DOUBLED, (2, 1)
    block_scale, scales, scale_table = None, at("d", 8), "ue4m3_half"
    advice = "Models trained or tuned in NVFP4."
