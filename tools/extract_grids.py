"""Writes the code books of I-quants as data files, from the gguf package's tables.

    python tools/extract_grids.py

quantkit/formats/grids.py checks the hashes of what this writes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf.quants
import numpy as np

OUT = Path(__file__).parent.parent / "quantkit" / "formats" / "data"


def main() -> None:
    """One file a code book: unsigned bytes, entries × weights of one entry."""
    for name in ("IQ3_S",):
        table = getattr(gguf.quants, name)
        table.init_grid()
        grid = np.asarray(table.grid, np.float32).reshape(-1, table.grid_shape[1])
        raw = grid.astype(np.uint8).tobytes()
        path = OUT / f"{name.lower()}_grid.bin"
        path.write_bytes(raw)
        print(f"{path.name}: {grid.shape}, sha256 {hashlib.sha256(raw).hexdigest()}")


if __name__ == "__main__":
    main()
