"""Decoders as Triton functions, compiled from generated source when a driver first asks for them."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.formats.grids import grid, table
from quantkit.formats.layout import Grid
from quantkit.kernels.source import decoder_source, pieces_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decoder:
    """decode, where: Triton functions of ``source.decoder_source``. pieces: into how many parts a block falls."""

    format: type[Format]
    decode: Any
    where: Any
    pieces: int


@cache
def decoder(fmt: type[Format]) -> Decoder:
    """The decoder of a format. Raises FormatError for formats without blocks, and if triton is not installed."""
    if fmt.codes is None:
        raise FormatError(f"{fmt.name} has no blocks to decode", hint="convert the tensor with torch")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise FormatError("Triton is not installed", hint="install triton, or decode on the CPU") from None
    source, name = decoder_source(fmt), f"<decoder of {fmt.name}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # where Triton reads it from
    space: dict[str, Any] = {"__name__": f"quantkit.kernels.generated_{fmt.name.lower()}"}
    exec(compile(source, name, "exec"), space)
    return Decoder(fmt, space["decode"], space["where"], len(pieces_of(fmt)))


@cache
def tables(fmt: type[Format], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the code book, one integer each; values of the scales' table), on a device; one zero where there is none."""
    import torch

    book, scales = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    if isinstance(fmt.values, Grid):
        rows = np.ascontiguousarray(grid(fmt.values.name))
        book = torch.from_numpy(rows.view(np.int64 if rows.shape[1] == 8 else np.int32).reshape(-1).copy())
    if fmt.scale_table is not None:
        scales = torch.from_numpy(table(fmt.scale_table).copy())
    return book.to(device), scales.to(device)
