"""The same bytes in another order, for formats whose blocks cannot be loaded wide: Q6_K's 210 bytes lie at even addresses only.

A repacked tensor has one plane for each field of the block's layout: first that field of all blocks, then the next
field of all blocks. Fields that are multiples of 16 bytes come first, so that each can be loaded 16 bytes at a time.
Nothing is added or lost; ``unpack`` gives the file's bytes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.formats import Format
from quantkit.kernels.source import planes_of

if TYPE_CHECKING:
    import torch

WIDE = 16  # bytes of the widest load


def gains(fmt: type[Format]) -> bool:
    """Whether blocks of the format are no multiple of a wide load, so that planes can be loaded wider."""
    return fmt.codes is not None and fmt.block_bytes() % WIDE != 0


def pack(data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """Packed rows of a tensor, uint8 (..., bytes), as planes in the same shape (whose rows mean nothing any more)."""
    import torch

    blocks = data.reshape(-1, fmt.block_bytes())
    parts = [blocks[:, plane.offset : plane.offset + plane.size].reshape(-1) for plane in planes_of(fmt)]
    return torch.cat(parts).reshape(data.shape)


def unpack(data: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """The inverse of ``pack``."""
    import torch

    flat, first = data.reshape(-1), 0
    blocks = torch.empty(flat.numel() // fmt.block_bytes(), fmt.block_bytes(), dtype=torch.uint8, device=data.device)
    for plane in planes_of(fmt):
        size = plane.size * len(blocks)
        blocks[:, plane.offset : plane.offset + plane.size] = flat[first : first + size].reshape(-1, plane.size)
        first += size
    return blocks.reshape(data.shape)
