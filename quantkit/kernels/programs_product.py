"""Triton: products with packed weights that are never expanded. Imported only inside functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matvec(
    x, raw, out, rows, blocks, book, scales, DECODE: tl.constexpr, WHERE: tl.constexpr, PIECES: tl.constexpr,
    ELEMENTS: tl.constexpr, BYTES: tl.constexpr, SHAPE: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token a program: out[token, row] = Σ x[token, column] · weight[row, column], sums in float32.

    raw: uint8 (rows, blocks · BYTES); x: (tokens, blocks · ELEMENTS); out: (tokens, rows). SHAPE: (runs, length) of every
    piece, None if they differ. TOGETHER: blocks of a row that are decoded at a time.
    """
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS * TOGETHER) // TOGETHER
    inside = tl.arange(0, ROWS * TOGETHER) % TOGETHER
    if SHAPE is None:
        total = tl.zeros((ROWS * TOGETHER,), tl.float32)
    else:
        total = tl.zeros((ROWS * TOGETHER, SHAPE[0], SHAPE[1]), tl.float32)
    for first in range(0, blocks, TOGETHER):
        block = (first + inside)[:, None, None]
        live = (row[:, None, None] < rows) & (block < blocks)
        base = raw + (row[:, None, None] * blocks + block) * BYTES
        for piece in tl.static_range(PIECES):
            weight = DECODE(base, live, book, scales, piece)
            given = tl.load(x + (token * blocks + block) * ELEMENTS + WHERE(piece), mask=live, other=0.0)
            part = tl.where(live, weight * given.to(tl.float32), 0.0)
            if SHAPE is None:
                total += tl.sum(tl.sum(part, 2), 1)
            else:
                total += part
    sums = total if SHAPE is None else tl.sum(tl.sum(total, 2), 1)
    sums = tl.sum(tl.reshape(sums, (ROWS, TOGETHER)), 1)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(out + token * rows + place, sums.to(out.dtype.element_ty), mask=place < rows)
