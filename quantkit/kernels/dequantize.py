"""Packed rows to weights in torch: a Triton program on a GPU, the compiled decoders of ``formats`` on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.kernels.decoders import decoder, tables

if TYPE_CHECKING:
    import torch

WEIGHTS = 4096  # decoded by one program


def dequantize(data: torch.Tensor, fmt: type[Format], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Weights of packed rows: uint8 (..., bytes) → dtype (..., bytes / block bytes · elements), on the same device.

    dtype: float32 by default, to the bit what ``Format.decode`` gives; bfloat16 and float16 are rounded from that.
    Raises FormatError if the data are no whole blocks of contiguous uint8.
    """
    import torch

    dtype = dtype or torch.float32
    check(data, fmt, dtype)
    if data.device.type == "cpu" and not interpreted():
        return torch.from_numpy(fmt.decode(data.numpy())).to(dtype)
    return launch(data, fmt, dtype)


def check(data: torch.Tensor, fmt: type[Format], dtype: torch.dtype) -> None:
    """Raise FormatError for data that are no packed rows of the format."""
    import torch

    if data.dtype != torch.uint8:
        raise FormatError(f"packed weights are {data.dtype}", hint="give their bytes, as torch.uint8")
    if not data.is_contiguous():
        raise FormatError("packed weights are not contiguous", hint="call .contiguous()")
    if not data.ndim or data.shape[-1] % fmt.block_bytes():
        raise FormatError(
            f"rows of shape {tuple(data.shape)} are not a multiple of {fmt.name}'s block of {fmt.block_bytes()} bytes",
            hint="the data are of another format, or cut",
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise FormatError(f"{fmt.name} is not decoded to {dtype}", hint="float32, bfloat16 and float16 can be had")


def interpreted() -> bool:
    """Whether Triton's programs run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(data: torch.Tensor, fmt: type[Format], dtype: torch.dtype) -> torch.Tensor:
    """Run the program."""
    import torch

    made = decoder(fmt)  # type: ignore[arg-type]
    from quantkit.kernels.programs_dequantize import dequantize as program

    book, scales = tables(fmt, str(data.device))  # type: ignore[arg-type]
    count = data.numel() // fmt.block_bytes()
    shape = (*data.shape[:-1], data.shape[-1] // fmt.block_bytes() * fmt.elements)
    out = torch.empty(shape, dtype=dtype, device=data.device)
    together = max(1, WEIGHTS // fmt.elements)
    if count:
        program[(-(-count // together),)](
            data, out, count, book, scales, DECODE=made.decode, WHERE=made.where, PIECES=made.pieces, ELEMENTS=fmt.elements,
            BYTES=fmt.block_bytes(), TOGETHER=together, enable_fp_fusion=False,  # else not the bits of Format.decode
        )  # fmt: skip
    return out
