"""Small groups of low-precision floats that share a small scale: the OCP's MX formats and NVIDIA's NVFP4.

Sources: OCP Microscaling Formats (MX) Specification v1.0; NVIDIA, "Introducing NVFP4"; names and scale rules
of compressed-tensors 0.20 (compressors/mxfp4, mxfp8, nvfp4; quantization/utils/mxfp_utils.py). FP4 codes are
packed two to a byte, the first in the low nibble.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.formats.tensors import words
from quantkit.formats.tensors.base import F32, TensorFormat, TensorLayout
from quantkit.formats.tensors.minifloat import E2M1, E4M3, E5M2, E8M0_VALUES, MiniFloat, e8m0_encode
from quantkit.formats.tensors.parts import Parts


def _grouped(weight: npt.NDArray[np.float32], group: int) -> npt.NDArray[np.float32]:
    """A view of a matrix as (rows, groups, group)."""
    return weight.reshape(len(weight), -1, group)


def _rounded(number: MiniFloat, grouped: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Nearest codes of weights (rows, groups, group) over their scales (rows, groups): uint8 (rows, columns)."""
    scaled = grouped / scale[:, :, None]
    if number is E2M1:
        scaled += F32(0)  # −0 becomes 0, as in compressed-tensors
    return number.encode(scaled).reshape(len(grouped), -1)


class _MX(TensorFormat):
    """w = 2^(e − 127) · q, 32 weights to a scale. A scale of 255 is NaN."""

    group = 32
    number: ClassVar[MiniFloat]
    # From this mantissa of the largest weight the scale is doubled: 2 is the specification's rule (the
    # largest may saturate), 1.75 compressed-tensors', under which E4M3 never saturates.
    up_from: ClassVar[float] = 1.75

    @classmethod
    def _layout(cls, rows, columns):
        scales = TensorLayout("U8", (rows, columns // cls.group))
        if cls.element_bits == 4:
            return {"weight_packed": TensorLayout("U8", (rows, columns // 2)), "weight_scale": scales}
        return {"weight": TensorLayout(f"F8_{cls.element.upper()}", (rows, columns)), "weight_scale": scales}

    @classmethod
    def _encode(cls, weight):
        grouped = _grouped(weight, cls.group)
        emax = int(np.frexp(cls.number.max)[1]) - 1  # exponent of the largest number
        scale = e8m0_encode(np.abs(grouped).max(axis=2), cls.up_from, emax)
        codes = _rounded(cls.number, grouped, E8M0_VALUES[scale])
        if cls.element_bits == 4:
            return {"weight_packed": words.pack(codes, 4, "u1"), "weight_scale": scale}
        return {"weight": codes, "weight_scale": scale}

    @classmethod
    def _parts(cls, tensors, shape):
        codes = words.unpack(tensors["weight_packed"], 4, shape[1]) if cls.element_bits == 4 else tensors["weight"]
        scale = tensors["weight_scale"]
        return Parts(cls.element.upper(), codes, cls.number.values, E8M0_VALUES[scale], "E8M0", scale_codes=scale)


class MXFP4(_MX):
    """E2M1 codes."""

    name, element, element_bits, number = "MXFP4", "e2m1", 4, E2M1
    loads_in = ("transformers", "vLLM")
    source = "OCP MX v1.0; compressed-tensors 0.20 (mxfp4-pack-quantized)"


class MXFP8(_MX):
    """E4M3 codes."""

    name, element, element_bits, number = "MXFP8", "e4m3", 8, E4M3
    loads_in = ("transformers",)
    source = "OCP MX v1.0; compressed-tensors 0.20 (mxfp8-quantized)"


class MXFP8_E5M2(_MX):
    """E5M2 codes, by the specification's own scale rule; no known program loads them as weights."""

    name, element, element_bits, number, up_from = "MXFP8_E5M2", "e5m2", 8, E5M2, 2.0
    source = "OCP MX v1.0, section 6.3; tensors named as for MXFP8"


class NVFP4(TensorFormat):
    """w = q · s / g: E2M1 codes, an E4M3 scale for 16 weights and one float32 divisor for the tensor.

    The divisor spreads the scales over E4M3: it is 448 · 6 / the largest weight.
    """

    name, element, element_bits, group = "NVFP4", "e2m1", 4, 16
    loads_in = ("transformers", "vLLM")
    source = "NVIDIA, Introducing NVFP4 (developer.nvidia.com/blog); compressed-tensors 0.20 (nvfp4-pack-quantized)"

    @classmethod
    def _layout(cls, rows, columns):
        return {
            "weight_packed": TensorLayout("U8", (rows, columns // 2)),
            "weight_scale": TensorLayout("F8_E4M3", (rows, columns // cls.group)),
            "weight_global_scale": TensorLayout("F32", (1,)),
        }

    @classmethod
    def _encode(cls, weight):
        grouped = _grouped(weight, cls.group)
        largest = np.abs(grouped).max(axis=2)
        # A reciprocal and a product, which is what torch makes of a number over a tensor.
        divisor = F32(1) / np.maximum(largest.max(), np.finfo(F32).tiny).reshape(1) * (E4M3.max * E2M1.max)
        divisor = np.where(np.isfinite(divisor), divisor, F32(1)).astype(F32)
        scale = E4M3.encode(divisor * (largest / E2M1.max))
        scale[scale == 0] = E4M3.encode(np.array(0.125, F32))
        codes = _rounded(E2M1, grouped, E4M3.decode(scale) / divisor)
        return {"weight_packed": words.pack(codes, 4, "u1"), "weight_scale": scale, "weight_global_scale": divisor}

    @classmethod
    def _parts(cls, tensors, shape):
        codes, stored = words.unpack(tensors["weight_packed"], 4, shape[1]), tensors["weight_scale"]
        divisor = tensors["weight_global_scale"][0]
        scale = E4M3.decode(stored) / divisor
        return Parts("E2M1", codes, E2M1.values, scale, "E4M3", scale_codes=stored, divisor=divisor)
