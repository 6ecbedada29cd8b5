"""Products with packed weights on the CPU: rows are decoded into a tile that stays in cache, and multiplied there.

Every thread decodes and multiplies its own rows, with BLAS on one thread: torch's threads would wait busily for each
other's decoding (8 ms a panel on two cores).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quantkit.formats import Format
from quantkit.formats.compiled import Decoder, decoder
from quantkit.threads import lone_products, map_rows

if TYPE_CHECKING:
    import torch

FEW = 4  # tokens up to which a tile is multiplied by the thread that decoded it
TILE = 1 << 16  # weights that a thread decodes at a time for a few tokens: 256 KiB
PANEL = 1 << 18  # and for many: 1 MiB, large enough for BLAS
WIDE = 256  # columns that a thread takes at least in a transposed product


def decode(data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """Packed rows, uint8 (..., bytes), on the CPU to float32 (..., columns), on several threads; bits of Format.decode."""
    import torch

    rows = _blocks(data, fmt)
    out = np.empty((*rows.shape[:2], fmt.elements), np.float32)
    _decode_rows(rows, out, fmt)
    return torch.from_numpy(out.reshape(*data.shape[:-1], -1))


def matmul(x: torch.Tensor, data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """x · Wᵀ: float32 (tokens, columns) times packed rows, uint8 (rows, bytes) → float32 (tokens, rows)."""
    import torch

    given, rows, run, columns = np.ascontiguousarray(x.detach().numpy()), _blocks(data, fmt), _decoder(fmt), x.shape[1]
    from quantkit.kernels.loops_host import dots  # after the decoder, which says where compiled code is kept

    out = np.empty((len(given), len(rows)), np.float32)
    few = len(given) <= FEW
    step = max(1, (TILE if few else PANEL) // columns)

    def work(part: slice) -> None:
        tile = np.empty((min(step, part.stop - part.start), columns), np.float32)
        for first in range(part.start, part.stop, step):
            some = rows[first : min(first + step, part.stop)]
            values = tile[: len(some)]
            run(some.reshape(-1, rows.shape[2]), values.reshape(-1, fmt.elements))
            if few:
                dots(values, given, out[:, first : first + len(some)])
            else:
                np.matmul(given, values.T, out=out[:, first : first + len(some)])

    with contextlib.nullcontext() if few else lone_products(2):
        map_rows(work, len(rows), columns, torch.get_num_threads())
    return torch.from_numpy(out)


def matmul_transposed(x: torch.Tensor, data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """x · W: float32 (tokens, rows) times packed rows, uint8 (rows, bytes) → float32 (tokens, columns)."""
    import torch

    given, rows, run, elements = np.ascontiguousarray(x.detach().numpy()), _blocks(data, fmt), _decoder(fmt), fmt.elements
    out = np.zeros((len(given), rows.shape[1] * elements), np.float32)
    together = max(1, WIDE // elements)

    def work(part: slice) -> None:
        blocks = slice(part.start * together, min(part.stop * together, rows.shape[1]))
        wide = (blocks.stop - blocks.start) * elements
        step = max(1, PANEL // wide)
        target = out[:, blocks.start * elements : blocks.stop * elements]
        for first in range(0, len(rows), step):
            some = np.ascontiguousarray(rows[first : first + step, blocks])
            values = np.empty((len(some), wide), np.float32)
            run(some.reshape(-1, rows.shape[2]), values.reshape(-1, elements))
            target += given[:, first : first + len(some)] @ values

    with lone_products(2):
        map_rows(work, -(-rows.shape[1] // together), len(rows) * together * elements, torch.get_num_threads())
    return torch.from_numpy(out)


def _decoder(fmt: type[Format]) -> Decoder:
    return decoder(fmt)  # type: ignore[arg-type]


def _blocks(data: torch.Tensor, fmt: type[Format]) -> npt.NDArray[np.uint8]:
    """Packed rows as (rows, blocks, bytes of a block)."""
    size = fmt.block_bytes()
    return data.detach().numpy().reshape(-1, data.shape[-1] // size, size)


def _decode_rows(rows: npt.NDArray[np.uint8], out: npt.NDArray[np.float32], fmt: type[Format]) -> None:
    """Decode on torch's number of threads. out: float32 (rows, blocks, elements)."""
    import torch

    run = _decoder(fmt)

    def work(part: slice) -> None:
        run(rows[part].reshape(-1, rows.shape[2]), out[part].reshape(-1, out.shape[2]))

    map_rows(work, len(rows), rows.shape[1] * fmt.elements, torch.get_num_threads())
