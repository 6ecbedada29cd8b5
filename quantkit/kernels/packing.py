"""What every driver takes: packed bytes, their format, and whether they were repacked; checks, and what programs need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.formats.tensors.blocks import packed_format
from quantkit.kernels import repack
from quantkit.kernels.decoders import Decoder, decoder, tables

if TYPE_CHECKING:
    import torch

PLANES = ":planes"  # after a format's name: repacked


@dataclass(frozen=True)
class Packing:
    """How bytes are to be read. planes: repacked, see repack.py."""

    format: type[Format]
    planes: bool = False

    @classmethod
    def of(cls, name: str) -> Packing:
        """``Q6_K`` or ``Q6_K:planes``, or a format of formats/tensors/blocks.py. Raises FormatError for an unknown format."""
        return cls(packed_format(name.removesuffix(PLANES)), name.endswith(PLANES))

    def __str__(self) -> str:
        return self.format.name + (PLANES if self.planes else "")

    def columns(self, data: torch.Tensor) -> int:
        """Weights in a row."""
        return data.shape[-1] // self.format.block_bytes() * self.format.elements

    def decoder(self) -> Decoder:
        """The Triton functions that decode it."""
        return decoder(self.format, self.planes)  # type: ignore[arg-type]

    def arguments(self, data: torch.Tensor, suffix: str = "") -> dict[str, Any]:
        """What a program needs to decode ``data``; with a suffix where it decodes two."""
        made, (book, floats) = self.decoder(), tables(self.format, str(data.device))  # type: ignore[arg-type]
        found = {
            "raw": data, "book": book, "floats": floats, "blocks": data.shape[-1] // self.format.block_bytes(),
            "total": data.numel() // self.format.block_bytes(), "DECODE": made.decode, "PIECES": made.pieces, "ELEMENTS": self.format.elements,
        }  # fmt: skip
        return {f"{name}{suffix}": value for name, value in found.items()}


def check(data: torch.Tensor, packing: Packing, dtype: torch.dtype) -> None:
    """Raise FormatError for data that are no packed rows of the format, and for types nobody computes in."""
    import torch

    fmt = packing.format
    if data.dtype != torch.uint8:
        raise FormatError(f"packed weights are {data.dtype}", hint="give their bytes, as torch.uint8")
    if not data.is_contiguous():
        raise FormatError("packed weights are not contiguous", hint="call .contiguous()")
    if fmt.codes is None:
        raise FormatError(f"{fmt.name} has no blocks to decode", hint="convert the tensor with torch")
    if not data.ndim or data.shape[-1] % fmt.block_bytes():
        raise FormatError(
            f"rows of shape {tuple(data.shape)} are not a multiple of {fmt.name}'s block of {fmt.block_bytes()} bytes",
            hint="the data are of another format, or cut",
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise FormatError(f"{fmt.name} is not decoded to {dtype}", hint="float32, bfloat16 and float16 can be had")


def check_product(x: torch.Tensor, data: torch.Tensor, packing: Packing, transposed: bool = False, axes: int = 2) -> None:
    """Raise FormatError if inputs and packed rows do not fit each other. axes: 2 for one matrix, 3 for experts."""
    check(data, packing, x.dtype)
    rows, columns = data.shape[-2] if data.ndim > 1 else 0, packing.columns(data)
    wanted = rows if transposed else columns
    if data.ndim != axes or not x.ndim or x.shape[-1] != wanted:
        raise FormatError(
            f"inputs of shape {tuple(x.shape)} do not fit {'the transpose of ' if transposed else ''}rows of {columns} weights "
            f"in {packing.format.name}, {tuple(data.shape)} bytes",
            hint=f"the last axis of x must be {wanted}, the weights must have {axes} axes",
        )
    if x.device != data.device:
        raise FormatError(f"inputs are on {x.device}, packed weights on {data.device}", hint="move one of them")


def check_low_rank(x: torch.Tensor, data: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None) -> None:
    """Raise FormatError if low · upᵀ cannot be added to x · Wᵀ: both or none, of the type of x, of one rank."""
    if low is None and up is None:
        return
    fits = low is not None and up is not None and low.shape[:-1] == x.shape[:-1] and up.shape == (len(data), low.shape[-1])
    if not fits or low.dtype != x.dtype or up.dtype != x.dtype or low.device != x.device or up.device != x.device:  # type: ignore[union-attr]
        shapes = [None if value is None else (tuple(value.shape), value.dtype, str(value.device)) for value in (low, up)]
        raise FormatError(
            f"a low-rank addition of {shapes} does not fit inputs {tuple(x.shape)} and {len(data)} rows in {x.dtype}",
            hint="low is (..., rank), up (rows, rank), both of the inputs' type and device",
        )


def file_bytes(data: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The bytes in the order of the file."""
    return repack.unpack(data, packing.format) if packing.planes else data
