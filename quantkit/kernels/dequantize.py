"""Packed rows to weights in torch: a Triton program on a GPU, the compiled decoders of ``formats`` on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import FormatError
from quantkit.kernels import host
from quantkit.kernels.devices import launch, on_host
from quantkit.kernels.packing import Packing, check, file_bytes
from quantkit.kernels.settings import settings_of

if TYPE_CHECKING:
    import torch


def dequantize(data: torch.Tensor, packing: Packing, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Weights of packed rows: uint8 (..., bytes) → dtype (..., columns), on the same device.

    dtype: float32 by default, to the bit what ``Format.decode`` gives; bfloat16 and float16 are rounded from that.
    Raises FormatError if the data are no whole blocks of contiguous uint8.
    """
    import torch

    dtype = dtype or torch.float32
    check(data, packing, dtype)
    shape = (*data.shape[:-1], packing.columns(data))
    if on_host(data):
        return host.decode(file_bytes(data, packing), packing.format).to(dtype)
    return _launch(data, packing, None, dtype).reshape(shape)


def embedding(ids: torch.Tensor, data: torch.Tensor, packing: Packing, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows of a packed matrix, uint8 (rows, bytes), by number: integers (...) → dtype (..., columns).

    Raises FormatError as ``dequantize`` does, and for numbers on another device.
    """
    import torch

    dtype = dtype or torch.float32
    check(data, packing, dtype)
    if data.ndim != 2 or ids.device != data.device:
        raise FormatError(
            f"row numbers on {ids.device} do not fit packed rows {tuple(data.shape)} on {data.device}",
            hint="a matrix of packed rows and numbers on its device are needed",
        )
    shape = (*ids.shape, packing.columns(data))
    if on_host(data):
        return host.decode(file_bytes(data, packing)[ids.reshape(-1)], packing.format).reshape(shape).to(dtype)
    return _launch(data, packing, ids.reshape(-1).contiguous(), dtype).reshape(shape)


def _launch(data: torch.Tensor, packing: Packing, ids: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Run the program. ids: the rows wanted, None for all."""
    import torch

    given = packing.arguments(data)
    from quantkit.kernels.programs_dequantize import dequantize as program

    blocks, elements = given["blocks"], packing.format.elements
    count = given["total"] if ids is None else len(ids) * blocks
    out = torch.empty(count * elements, dtype=dtype, device=data.device)
    together = max(1, settings_of(data).decoded // packing.decoder().largest)
    if count:
        launch(
            program, (-(-count // together),), data, out=out, ids=data if ids is None else ids, count=count,
            WHERE=packing.decoder().where, GATHER=ids is not None, TOGETHER=together, **given,
            enable_fp_fusion=False,  # else not the bits of Format.decode
        )  # fmt: skip
    return out
