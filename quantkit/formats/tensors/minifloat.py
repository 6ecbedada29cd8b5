"""Floating-point numbers of at most 16 bits as their bits: rounding to them and reading them.

E4M3 and E5M2: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433); E2M1 and E8M0: OCP
Microscaling Formats (MX) Specification v1.0, section 5. Rounding is to nearest, ties to even; numbers
beyond the largest saturate, as the MX specification asks and as every quantizer here expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 18  # numbers rounded at a time: temporaries stay in the cache


@dataclass(frozen=True)
class MiniFloat:
    """A sign bit, then exponent and mantissa bits.

    specials: ``none`` (every code is a number), ``nan`` (all ones is NaN, no infinity: E4M3FN) or ``ieee``
    (the largest exponent holds infinity and NaN).
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Literal["none", "nan", "ieee"]

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def largest(self) -> int:
        """Code of the largest number."""
        return {"none": self.sign - 1, "nan": self.sign - 2, "ieee": self.sign - 1 - (1 << self.mantissa_bits)}[self.specials]

    @property
    def max(self) -> np.float32:
        """The largest number."""
        return self.values[self.largest]

    @cached_property
    def values(self) -> npt.NDArray[np.float32]:
        """What every code stands for, float32 (2^bits,)."""
        codes = np.arange(self.sign)
        exponent, mantissa = codes >> self.mantissa_bits, codes & ((1 << self.mantissa_bits) - 1)
        fraction = (exponent > 0) + mantissa / (1 << self.mantissa_bits)
        numbers = np.ldexp(fraction, np.maximum(exponent, 1) - self.bias)
        if self.specials == "ieee":
            numbers[self.largest + 1] = np.inf
        if self.specials != "none":
            numbers[self.largest + (2 if self.specials == "ieee" else 1) :] = np.nan
        return np.concatenate([numbers, -numbers]).astype(np.float32)

    def encode(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Codes of the nearest numbers, uint8 in the shape of ``x``.

        Infinity becomes the largest number; NaN becomes the format's NaN, or the largest where it has none.
        """
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        codes = np.empty(flat.size, np.uint8)
        for start in range(0, flat.size, _CHUNK):
            codes[start : start + _CHUNK] = self._encode(flat[start : start + _CHUNK])
        return codes.reshape(x.shape)

    def decode(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The numbers that codes stand for, in their shape."""
        return self.values[codes]

    def _encode(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
        """Codes of a short vector."""
        dropped = 23 - self.mantissa_bits  # mantissa bits of float32 that go
        size = np.fmin(np.abs(x), self.max)
        bits = size.view(np.uint32)
        half = np.uint32((1 << (dropped - 1)) - 1)
        rounded = (bits + half + ((bits >> np.uint32(dropped)) & np.uint32(1))) >> np.uint32(dropped)
        normal = rounded - np.uint32((127 - self.bias) << self.mantissa_bits)
        subnormal = np.rint(np.ldexp(size, self.bias + self.mantissa_bits - 1))
        codes = np.where(size < np.ldexp(np.float32(1), 1 - self.bias), subnormal.astype(np.uint32), normal)
        if self.specials != "none":
            codes[np.isnan(x)] = self.sign - 1
        return codes | (np.signbit(x) * np.uint32(self.sign))


E4M3 = MiniFloat(4, 3, 7, "nan")
E5M2 = MiniFloat(5, 2, 15, "ieee")
E2M1 = MiniFloat(2, 1, 1, "none")

E8M0_VALUES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32("nan")).astype(np.float32)


def e8m0_encode(x: npt.NDArray[np.float32], up_from: float = 1.5, exponent: int = 0) -> npt.NDArray[np.uint8]:
    """Codes of powers of two for ``x / 2^exponent``, x ≥ 0 and finite; out of range they saturate.

    up_from: a mantissa (in 1…2) from which the next higher power is taken: 1.5 rounds to nearest, 2 down.
    """
    fraction, power = np.frexp(x)  # x = fraction · 2^power, fraction in ½…1
    code = power - 1 + (2 * fraction >= up_from) + 127 - exponent
    return np.where(fraction > 0, np.clip(code, 0, 254), 0).astype(np.uint8)


def bfloat16_encode(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16 numbers of finite ``x``."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def bfloat16_decode(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
