"""Numba: products of a few tokens with a tile of decoded weights. Imported only inside functions."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def dots(tile, x, out):
    """out[t, r] = Σ x[t, i] · tile[r, i]. tile: float32 (rows, columns); x: float32 (tokens, columns)."""
    for r in range(tile.shape[0]):
        row = tile[r]
        for t in range(x.shape[0]):
            given, total = x[t], np.float32(0)
            for i in range(row.shape[0]):
                total += given[i] * row[i]
            out[t, r] = total
