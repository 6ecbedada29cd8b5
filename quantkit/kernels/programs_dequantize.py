"""Triton: packed blocks to weights. Imported only inside functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize(
    raw, out, ids, count, blocks, total, book, floats, DECODE: tl.constexpr, WHERE: tl.constexpr, PIECES: tl.constexpr,
    ELEMENTS: tl.constexpr, GATHER: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """TOGETHER whole blocks a program, of all rows or (GATHER) of the rows in ``ids``; rows that are not there are zeros.

    raw: uint8, ``total`` blocks in rows of ``blocks``; out: (count · ELEMENTS,), ``count`` blocks.
    """
    to = (tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER))[:, None, None]
    live = to < count
    block = to
    if GATHER:
        row = tl.load(ids + to // blocks, mask=live, other=-1).to(tl.int64)
        block = row * blocks + to % blocks
        inside = live & (row >= 0) & (block < total)
    else:
        inside = live
    for piece in tl.static_range(PIECES):
        weight = tl.where(inside, DECODE(raw, block, tl.cast(total, tl.int64), inside, book, floats, piece), 0.0)
        tl.store(out + to * ELEMENTS + WHERE(piece), weight.to(out.dtype.element_ty), mask=live)
