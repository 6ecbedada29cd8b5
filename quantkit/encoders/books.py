"""Code books as ggml's encoders search them: lattice points, and the neighbours of every point off the book."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from quantkit.formats.grids import grid

Book = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]
# Distances to the code book that count as neighbours (ggml: nwant of iq2xs_init_impl and iq3xs_init_impl).
WANTED = {"iq1": 3, "iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3}


@cache
def book(name: str) -> Book:
    """(entries, index, start, neighbours) of a code book.

    entries: float32 (n, width), odd integers 2·level + 1. index: int32, by point of the lattice the number of
    its entry or −1. start, neighbours: entries near a point off the book, nearest first, ties by number, are
    neighbours[start[point] : start[point + 1]].
    """
    from quantkit.encoders.loops_books import find_neighbours

    values = grid(name)
    levels = np.searchsorted(np.unique(values), values).astype(np.int32)
    bits = 2 if levels.max() < 4 else 3
    width = levels.shape[1]
    points = (levels << (bits * np.arange(width, dtype=np.int32))).sum(1)
    index = np.full(1 << (bits * width), -1, np.int32)
    index[points] = np.arange(len(levels))
    start, neighbours, total = find_neighbours(2 * levels + 1, index, bits, WANTED[name])
    return (2 * levels + 1).astype(np.float32), index, start, neighbours[:total].copy()
