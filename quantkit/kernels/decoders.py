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
from quantkit.formats.layout import Grid, Table
from quantkit.kernels.source import decoder_source, pieces_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decoder:
    """decode, where, place: Triton functions of ``source.decoder_source``. pieces: into how many parts a block falls.

    shape: (runs, length) of every piece, None if they differ. sizes: weights in each piece.
    """

    decode: Any
    where: Any
    place: Any
    pieces: int
    shape: tuple[int, int] | None
    sizes: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Weights in the largest piece."""
        return max(self.sizes)


@cache
def decoder(fmt: type[Format], planes: bool = False) -> Decoder:
    """The decoder of a format, of tensors as they lie in a file or (planes) repacked.

    Raises FormatError for formats without blocks, and if triton is not installed.
    """
    if fmt.codes is None:
        raise FormatError(f"{fmt.name} has no blocks to decode", hint="convert the tensor with torch")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise FormatError("Triton is not installed", hint="install triton, or decode on the CPU") from None
    source, name = decoder_source(fmt, planes), f"<decoder of {fmt.name}{' planes' if planes else ''}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # where Triton reads it from
    space: dict[str, Any] = {"__name__": f"quantkit.kernels.generated_{fmt.name.lower()}{'_planes' if planes else ''}"}
    exec(compile(source, name, "exec"), space)
    shapes = [piece.elements.shape for piece in pieces_of(fmt)]
    return Decoder(
        space["decode"], space["where"], space["place"], len(shapes), shapes[0] if len(set(shapes)) == 1 else None,
        tuple(runs * length for runs, length in shapes),
    )  # fmt: skip


@cache
def tables(fmt: type[Format], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the code book, one integer each; numbers of the scales' or the codes' table), on a device; a zero where there is none."""
    import torch

    book, floats = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    if isinstance(fmt.values, Grid):
        rows = np.ascontiguousarray(grid(fmt.values.name))
        book = torch.from_numpy(rows.view(np.int64 if rows.shape[1] == 8 else np.int32).reshape(-1).copy())
    if fmt.scale_table is not None:
        floats = torch.from_numpy(table(fmt.scale_table).copy())
    elif isinstance(fmt.values, Table) and not fmt.values.whole:
        floats = torch.tensor(fmt.values.entries, dtype=torch.float32)
    return book.to(device), floats.to(device)
