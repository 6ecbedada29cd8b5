"""Code books of the I-quants: data files with a checked hash (made by tools/extract_grids.py)."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError

DATA = Path(__file__).parent / "data"
# name → (entries, weights of an entry, SHA-256)
GRIDS = {"iq3_s": (512, 4, "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f")}
# Values of the 4-bit non-linear types. Source: llama.cpp, ggml/src/ggml-common.h, kvalues_iq4nl.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)


@cache
def grid(name: str) -> npt.NDArray[np.uint8]:
    """The code book of a type, uint8 (entries, weights). Raises FormatError if the file is damaged."""
    entries, width, digest = GRIDS[name]
    raw = (DATA / f"{name}_grid.bin").read_bytes()
    if hashlib.sha256(raw).hexdigest() != digest:
        raise FormatError(f"{name}_grid.bin is damaged", hint="install quantkit again")
    return np.frombuffer(raw, np.uint8).reshape(entries, width)
