"""Triton: packed blocks to weights. Imported only inside functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize(
    raw, out, count, book, scales, DECODE: tl.constexpr, WHERE: tl.constexpr, PIECES: tl.constexpr, ELEMENTS: tl.constexpr,
    BYTES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """TOGETHER whole blocks a program. raw: uint8 (count · BYTES,); out: (count · ELEMENTS,)."""
    block = (tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER))[:, None, None]
    live = block < count
    base = raw + block * BYTES
    for piece in tl.static_range(PIECES):
        weight = DECODE(base, live, book, scales, piece)
        tl.store(out + block * ELEMENTS + WHERE(piece), weight.to(out.dtype.element_ty), mask=live)
