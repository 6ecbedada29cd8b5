"""Code books of the I-quants, which are data files with a checked hash, and tables that follow from a rule."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError

DATA = Path(__file__).parent / "data"
# name → (entries, weights of an entry, SHA-256); written by tools/extract_grids.py
GRIDS = {
    "iq1": (2048, 8, "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a"),
    "iq2_xxs": (256, 8, "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54"),
    "iq2_xs": (512, 8, "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de"),
    "iq2_s": (1024, 8, "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88"),
    "iq3_xxs": (256, 4, "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d"),
    "iq3_s": (512, 4, "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f"),
}


@cache
def grid(name: str) -> npt.NDArray[np.int8]:
    """A code book, int8 (entries, weights). Raises FormatError if the file is damaged."""
    entries, width, digest = GRIDS[name]
    raw = (DATA / f"{name}_grid.bin").read_bytes()
    if hashlib.sha256(raw).hexdigest() != digest:
        raise FormatError(f"{name}_grid.bin is damaged", hint="install quantkit again")
    return np.frombuffer(raw, np.int8).reshape(entries, width)


@cache
def table(name: str) -> np.ndarray:
    """A table by name.

    even_signs: uint8 (128,), eight sign bits with an even number of ones from their lower seven.
    e8m0_half: float32 (256,), half of a power of two given by its biased exponent (OCP MX v1.0, E8M0; no NaN).
    ue4m3_half: float32 (256,), half of an unsigned E4M3 number; its NaN pattern counts as zero, as in ggml.
    e4m3_half: float32 (256,), half of an E4M3 number.
    """
    code = np.arange(256)
    if name == "even_signs":
        low = code[:128]
        parity = np.unpackbits(low.astype(np.uint8)[:, None], axis=1).sum(1).astype(np.int64) & 1
        return (low | (parity << 7)).astype(np.uint8)
    if name == "e8m0_half":
        return np.ldexp(1.0, code - 128).astype(np.float32)
    if name == "ue4m3_half":
        exponent, mantissa = (code >> 3) & 15, code & 7
        value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
        return np.where(code == 0x7F, 0, value / 2).astype(np.float32)
    if name == "e4m3_half":
        from quantkit.formats.tensors.minifloat import E4M3

        return E4M3.values / np.float32(2)
    raise FormatError(f"there is no table {name!r}")
