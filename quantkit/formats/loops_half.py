"""Numba: half precision, and the options all compiled loops share. Imported only inside functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# error_model "numpy": 1/0 is infinity as in C, and loops with divisions can be vectorized.
OPTIONS: Any = {"nogil": True, "cache": True, "error_model": "numpy"}
HALF = np.float32(0.5)


@njit(inline="always", **OPTIONS)
def to_half(value):
    """float32 → bits of IEEE half, ties to even, overflow to infinity."""
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    mag = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if mag >= np.uint32(0x7F800000):  # infinity or NaN
        return np.uint16(sign | np.uint32(0x7C00) | (np.uint32(0x200) if mag > np.uint32(0x7F800000) else np.uint32(0)))
    if mag >= np.uint32(0x477FF000):  # rounds to 65536 or more
        return np.uint16(sign | np.uint32(0x7C00))
    if mag < np.uint32(0x38800000):  # subnormal half: let the float adder do the rounding
        magic = np.uint32(mag).view(np.float32) + HALF
        return np.uint16(sign | (np.float32(magic).view(np.uint32) - np.uint32(0x3F000000)))
    odd = np.uint32((mag >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(mag + np.uint32(0xFFF) + odd - np.uint32(0x38000000))
    return np.uint16(sign | (rounded >> np.uint32(13)))


@njit(inline="always", **OPTIONS)
def from_half(half):
    """Bits of IEEE half → float32 (finite or infinite values)."""
    h = np.uint32(half)
    sign = np.uint32((h & np.uint32(0x8000)) << np.uint32(16))
    mag = np.uint32(h & np.uint32(0x7FFF))
    if mag >= np.uint32(0x7C00):
        out = np.uint32(sign | np.uint32(0x7F800000) | np.uint32((mag & np.uint32(0x3FF)) << np.uint32(13)))
        return np.uint32(out).view(np.float32)
    if mag < np.uint32(0x400):
        value = np.float32(mag) * np.float32(5.9604644775390625e-08)  # 2^-24
        return -value if sign else value
    out = np.uint32(sign | np.uint32((mag << np.uint32(13)) + np.uint32(0x38000000)))
    return np.uint32(out).view(np.float32)
