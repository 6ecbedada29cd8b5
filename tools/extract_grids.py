"""Writes the code books of I-quants as data files, from the gguf package's tables.

    python tools/extract_grids.py

quantkit/formats/grids.py checks the hashes of what this writes (it prints them).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf.quants
import numpy as np

OUT = Path(__file__).parent.parent / "quantkit" / "formats" / "data"
TABLES = {"iq1": "IQ1_S", "iq2_xxs": "IQ2_XXS", "iq2_xs": "IQ2_XS", "iq2_s": "IQ2_S", "iq3_xxs": "IQ3_XXS", "iq3_s": "IQ3_S"}


def main() -> None:
    """One file a code book: signed bytes, entries × weights of one entry."""
    for name, source in TABLES.items():
        table = getattr(gguf.quants, source)
        table.init_grid()
        grid = np.asarray(table.grid, np.float32).reshape(table.grid_shape)
        raw = grid.astype(np.int8).tobytes()
        (OUT / f"{name}_grid.bin").write_bytes(raw)
        print(f'    "{name}": ({grid.shape[0]}, {grid.shape[1]}, "{hashlib.sha256(raw).hexdigest()}"),')


if __name__ == "__main__":
    main()
