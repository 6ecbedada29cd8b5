"""Triton: products with packed weights that are never expanded. Imported only inside functions.

Weights are the left operand: a tile of rows is decoded into registers, one dot for each piece of the blocks, and
multiplied with the tokens' inputs. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matvec(
    x, raw, out, low, up, rows, blocks, total, rank, book, floats, DECODE: tl.constexpr, WHERE: tl.constexpr,
    PIECES: tl.constexpr, ELEMENTS: tl.constexpr, RUNS: tl.constexpr, LENGTH: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token a program: out[token, row] = Σ x[token, column] · weight[row, column] [+ Σ low[token] · up[row]].

    raw: uint8, rows of ``blocks`` blocks, ``total`` in the tensor; x: (tokens, blocks · ELEMENTS); out: (tokens, rows).
    RUNS, LENGTH: of every piece, 0 if they differ. TOGETHER: blocks of a row that are decoded at a time. RANK: 0, or a
    power of two that is at least ``rank``; low: (tokens, rank), up: (rows, rank).
    """
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS * TOGETHER) // TOGETHER
    inside = tl.arange(0, ROWS * TOGETHER) % TOGETHER
    if RUNS == 0:
        total_sum = tl.zeros((ROWS * TOGETHER,), tl.float32)
    else:
        total_sum = tl.zeros((ROWS * TOGETHER, RUNS, LENGTH), tl.float32)
    for first in range(0, blocks, TOGETHER):
        block = (first + inside)[:, None, None]
        live = (row[:, None, None] < rows) & (block < blocks)
        for piece in tl.static_range(PIECES):
            weight = DECODE(raw, row[:, None, None] * blocks + block, tl.cast(total, tl.int64), live, book, floats, piece)
            given = tl.load(x + (token * blocks + block) * ELEMENTS + WHERE(piece), mask=live, other=0.0)
            part = tl.where(live, weight * given.to(tl.float32), 0.0)
            if RUNS == 0:
                total_sum += tl.sum(tl.sum(part, 2), 1)
            else:
                total_sum += part
    sums = total_sum if RUNS == 0 else tl.sum(tl.sum(total_sum, 2), 1)
    sums = tl.sum(tl.reshape(sums, (ROWS, TOGETHER)), 1)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if RANK > 0:
        r = tl.arange(0, RANK)
        left = tl.load(up + place[:, None] * rank + r[None, :], mask=(place < rows)[:, None] & (r < rank)[None, :], other=0.0)
        right = tl.load(low + token * rank + r, mask=r < rank, other=0.0)
        sums += tl.sum(left.to(tl.float32) * right.to(tl.float32)[None, :], 1)
    tl.store(out + token * rows + place, sums.to(out.dtype.element_ty), mask=place < rows)


@triton.jit
def decoded(
    raw, row, last, block, blocks, total, book, floats, DECODE: tl.constexpr, piece: tl.constexpr, ROWS: tl.constexpr,
    TOGETHER: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Weights of one piece of TOGETHER blocks from ``block`` on, in ROWS rows from ``row`` on: (ROWS, weights), zero outside.

    last: the row after the last one. row and last count from the beginning of the tensor.
    """
    line = (row + tl.arange(0, ROWS * TOGETHER) // TOGETHER)[:, None, None]
    inside = (block + tl.arange(0, ROWS * TOGETHER) % TOGETHER)[:, None, None]
    live = (line < last) & (inside < blocks)
    weight = tl.where(live, DECODE(raw, line * blocks + inside, tl.cast(total, tl.int64), live, book, floats, piece), 0.0)
    width: tl.constexpr = TOGETHER * weight.shape[1] * weight.shape[2]
    return tl.reshape(weight, (ROWS, width)).to(dtype)


@triton.jit
def columns_of(
    block, PLACE: tl.constexpr, piece: tl.constexpr, WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, TOGETHER: tl.constexpr
):
    """Columns of the WIDTH weights of a row that ``decoded`` gives: (weights,)."""
    SIZE: tl.constexpr = WIDTH // TOGETHER  # weights of the piece in one block
    index = tl.arange(0, WIDTH)
    return (block + index // SIZE) * ELEMENTS + PLACE(index % SIZE, piece)


@triton.jit
def accumulate(
    x, raw, row, last, token, tokens, blocks, total, book, floats, DECODE: tl.constexpr, PLACE: tl.constexpr,
    PIECES: tl.constexpr, ELEMENTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Σ weight · x over all columns for ROWS rows and TOKENS tokens: float32 (ROWS, TOKENS). tokens: where they end."""
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    line = token + tl.arange(0, TOKENS)
    dtype: tl.constexpr = x.dtype.element_ty
    for block in range(0, blocks, TOGETHER):
        for piece in tl.static_range(PIECES):
            weight = decoded(raw, row, last, block, blocks, total, book, floats, DECODE, piece, ROWS, TOGETHER, dtype)
            column = columns_of(block, PLACE, piece, weight.shape[1], ELEMENTS, TOGETHER)
            inside = (column < blocks * ELEMENTS)[:, None] & (line < tokens)[None, :]
            given = tl.load(x + line[None, :].to(tl.int64) * blocks * ELEMENTS + column[:, None], mask=inside, other=0.0)
            sums = tl.dot(weight, given, sums, input_precision="ieee")
    return sums


@triton.jit
def tile_of(slots, ends, rows, tokens, GROUPED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """(expert, first row in the tensor, row after its last, first token, where the expert's tokens end) of this program."""
    slot = tl.program_id(1)
    if GROUPED:
        expert = tl.load(slots + slot * 2).to(tl.int64)
        token = tl.load(slots + slot * 2 + 1)
        end = tl.load(ends + expert)
    else:
        expert = tl.cast(0, tl.int64)
        token = slot * TOKENS
        end = tokens
    return expert, expert * rows + tl.program_id(0) * ROWS, expert * rows + rows, token, end


@triton.jit
def store_tile(out, sums, row, token, end, rows, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """out[token, row] = sums, for ROWS rows from ``row`` (of one matrix) and the tokens before ``end``."""
    line, column = token + tl.arange(0, TOKENS), row + tl.arange(0, ROWS)
    inside = (column < rows)[:, None] & (line < end)[None, :]
    tl.store(out + line[None, :].to(tl.int64) * rows + column[:, None], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def matmul(
    x, raw, out, slots, ends, low, up, rows, tokens, blocks, total, rank, book, floats, DECODE: tl.constexpr,
    PLACE: tl.constexpr, PIECES: tl.constexpr, ELEMENTS: tl.constexpr, GROUPED: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A tile of x · Wᵀ [+ low · upᵀ]. x: (tokens, columns); out: (tokens, rows).

    GROUPED: tokens are sorted by expert; slots: int32 (programs, 2), the expert of a tile and its first token; ends:
    where the tokens of each expert end. RANK: 0, or a power of two from 16 up that is at least ``rank``;
    low: (tokens, rank), up: (rows, rank).
    """
    expert, row, last, token, end = tile_of(slots, ends, rows, tokens, GROUPED, ROWS, TOKENS)
    if token < end:
        sums = accumulate(
            x, raw, row, last, token, end, blocks, total, book, floats, DECODE, PLACE, PIECES, ELEMENTS, ROWS, TOKENS, TOGETHER
        )  # fmt: skip
        own = row - expert * rows
        if RANK > 0:
            r, line, column = tl.arange(0, RANK), token + tl.arange(0, TOKENS), own + tl.arange(0, ROWS)
            left = tl.load(
                up + column[:, None] * rank + r[None, :], mask=(column < rows)[:, None] & (r < rank)[None, :], other=0.0
            )
            right = tl.load(low + line[None, :] * rank + r[:, None], mask=(r < rank)[:, None] & (line < end)[None, :], other=0.0)
            sums = tl.dot(left, right, sums, input_precision="ieee")
        store_tile(out, sums, own, token, end, rows, ROWS, TOKENS)


@triton.jit
def swiglu(
    x, raw_gate, raw_up, out, slots, ends, rows, tokens, blocks_gate, total_gate, book_gate, floats_gate, blocks_up, total_up,
    book_up, floats_up, DECODE_gate: tl.constexpr, PLACE_gate: tl.constexpr, PIECES_gate: tl.constexpr,
    ELEMENTS_gate: tl.constexpr, TOGETHER_gate: tl.constexpr, DECODE_up: tl.constexpr, PLACE_up: tl.constexpr,
    PIECES_up: tl.constexpr, ELEMENTS_up: tl.constexpr, TOGETHER_up: tl.constexpr,
    GROUPED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile of silu(x · gateᵀ) ∘ (x · upᵀ); the two may be of different formats. See ``matmul``."""
    expert, row, last, token, end = tile_of(slots, ends, rows, tokens, GROUPED, ROWS, TOKENS)
    if token < end:
        gate = accumulate(
            x, raw_gate, row, last, token, end, blocks_gate, total_gate, book_gate, floats_gate, DECODE_gate, PLACE_gate,
            PIECES_gate, ELEMENTS_gate, ROWS, TOKENS, TOGETHER_gate,
        )  # fmt: skip
        up = accumulate(
            x, raw_up, row, last, token, end, blocks_up, total_up, book_up, floats_up, DECODE_up, PLACE_up,
            PIECES_up, ELEMENTS_up, ROWS, TOKENS, TOGETHER_up,
        )  # fmt: skip
        store_tile(out, gate / (1.0 + tl.exp(-gate)) * up, row - expert * rows, token, end, rows, ROWS, TOKENS)


@triton.jit
def matmul_transposed(
    x, raw, out, slots, ends, rows, tokens, blocks, total, book, floats, DECODE: tl.constexpr, PLACE: tl.constexpr,
    SIZE: tl.constexpr, ELEMENTS: tl.constexpr, PIECE: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A tile of x · W for the columns of one piece of TOGETHER blocks. x: (tokens, rows); out: (tokens, columns)."""
    expert, _, last, token, end = tile_of(slots, ends, rows, tokens, GROUPED, ROWS, TOKENS)
    if token < end:
        dtype: tl.constexpr = x.dtype.element_ty
        block = tl.program_id(0) * TOGETHER
        sums = tl.zeros((TOKENS, TOGETHER * SIZE), tl.float32)
        line = token + tl.arange(0, TOKENS)
        for row in range(0, rows, ROWS):
            weight = decoded(
                raw, expert * rows + row, last, block, blocks, total, book, floats, DECODE, PIECE, ROWS, TOGETHER, dtype
            )
            column = row + tl.arange(0, ROWS)
            inside = (line < end)[:, None] & (column < rows)[None, :]
            given = tl.load(x + line[:, None].to(tl.int64) * rows + column[None, :], mask=inside, other=0.0)
            sums = tl.dot(given, weight, sums, input_precision="ieee")
        at = columns_of(block, PLACE, PIECE, TOGETHER * SIZE, ELEMENTS, TOGETHER)
        inside = (line < end)[:, None] & (at < blocks * ELEMENTS)[None, :]
        tl.store(out + line[:, None].to(tl.int64) * blocks * ELEMENTS + at[None, :], sums.to(out.dtype.element_ty), mask=inside)
