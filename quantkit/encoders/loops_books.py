"""Numba: neighbours of the lattice points that are not on a code book.

Source of the rule: llama.cpp, ggml/src/ggml-quants.c (iq2xs_init_impl, iq3xs_init_impl).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.formats.loops_half import OPTIONS

FARTHEST = 1024  # above the largest squared distance: 8 · 4² and 4 · 14²


@njit(**OPTIONS)
def distances(entries, point, bits, out):
    """Squared distance of every entry to a point; returns the smallest."""
    width = entries.shape[1]
    smallest = np.int32(FARTHEST)
    for e in range(entries.shape[0]):
        total = np.int32(0)
        for k in range(width):
            diff = entries[e, k] - np.int32(2 * ((point >> (bits * k)) & ((1 << bits) - 1)) + 1)
            total += diff * diff
        out[e] = total
        smallest = min(smallest, total)
    return smallest


@njit(**OPTIONS)
def find_neighbours(entries, index, bits, wanted):
    """Entries at the ``wanted`` smallest distinct distances of each point off the book.

    entries: int32 (n, width); index: int32 (points,). Returns start int32 (points + 1,) and neighbours int32.
    """
    n = entries.shape[0]
    start = np.zeros(index.shape[0] + 1, np.int32)
    found = np.empty(1 << 16, np.int32)
    away = np.empty(n, np.int32)
    total = 0
    for point in range(index.shape[0]):
        if index[point] < 0:
            level = distances(entries, point, bits, away)
            if total + n > found.shape[0]:
                grown = np.empty(2 * found.shape[0], np.int32)
                for i in range(total):
                    grown[i] = found[i]
                found = grown
            for _ in range(wanted):
                following = np.int32(FARTHEST)
                for e in range(n):
                    if away[e] == level:
                        found[total] = e
                        total += 1
                    elif away[e] > level:
                        following = min(following, away[e])
                level = following
        start[point + 1] = total
    return start, found, total
