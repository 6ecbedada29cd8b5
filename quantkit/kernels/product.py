"""Products with packed weights: x · Wᵀ without ever expanding W where a program for it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.kernels.decoders import decoder, tables
from quantkit.kernels.dequantize import check, dequantize, interpreted
from quantkit.kernels.source import pieces_of

if TYPE_CHECKING:
    import torch

FEW = 8  # tokens for which a program reads the weights once for each
ROWS = 4  # outputs of one program
WEIGHTS = 512  # of one row that are decoded at a time


def matmul(x: torch.Tensor, data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """x · Wᵀ: (..., columns) times packed rows, uint8 (rows, bytes) → (..., rows) in the type of x; sums in float32.

    On a GPU up to FEW tokens are multiplied straight from the packed bytes; more of them, and all on the CPU, with
    decoded weights. Raises FormatError if x and the rows do not fit each other.
    """
    check(data, fmt, x.dtype)
    columns = data.shape[-1] // fmt.block_bytes() * fmt.elements
    if data.ndim != 2 or x.shape[-1] != columns:
        raise FormatError(
            f"inputs of shape {tuple(x.shape)} do not fit rows of {columns} weights in {fmt.name}, {tuple(data.shape)} bytes",
            hint="the last axis of x must be the number of weights in a row",
        )
    if x.device != data.device:
        raise FormatError(f"inputs are on {x.device}, packed weights on {data.device}", hint="move one of them")
    flat = x.reshape(-1, columns)
    if not 0 < len(flat) <= FEW or (x.device.type == "cpu" and not interpreted()):
        return x @ dequantize(data, fmt, x.dtype).T
    return _launch(flat.contiguous(), data, fmt).reshape(*x.shape[:-1], len(data))


def _launch(x: torch.Tensor, data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """Run the program for few tokens."""
    import torch

    made = decoder(fmt)  # type: ignore[arg-type]
    book, scales = tables(fmt, str(data.device))  # type: ignore[arg-type]
    from quantkit.kernels.programs_product import matvec

    shapes = {piece.elements.shape for piece in pieces_of(fmt)}
    out = torch.empty(len(x), len(data), dtype=x.dtype, device=x.device)
    matvec[(-(-len(data) // ROWS), len(x))](
        x, data, out, len(data), data.shape[1] // fmt.block_bytes(), book, scales, DECODE=made.decode, WHERE=made.where,
        PIECES=made.pieces, ELEMENTS=fmt.elements, BYTES=fmt.block_bytes(), SHAPE=shapes.pop() if len(shapes) == 1 else None,
        ROWS=ROWS, TOGETHER=max(1, WEIGHTS // fmt.elements),
    )  # fmt: skip
    return out
