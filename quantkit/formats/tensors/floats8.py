"""Eight-bit floats with a scale for the tensor, for each row, or for each block of 128 × 128 weights."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.formats.tensors.base import F32, TensorFormat, TensorLayout, bfloat16_scale, finite_scale
from quantkit.formats.tensors.minifloat import E4M3, E5M2, MiniFloat, bfloat16_decode
from quantkit.formats.tensors.parts import Parts

BLOCK = 128


class _FP8(TensorFormat):
    """w = s · q with a bfloat16 scale: compressed-tensors' ``float-quantized``."""

    element, element_bits = "e4m3", 8
    loads_in: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")
    source = "compressed-tensors 0.20 (float-quantized; quantization/utils/helpers.py, calculate_qparams)"
    number: ClassVar[MiniFloat] = E4M3
    per_row: ClassVar[bool] = False

    @classmethod
    def _layout(cls, rows, columns):
        return {
            "weight": TensorLayout(f"F8_{cls.element.upper()}", (rows, columns)),
            "weight_scale": TensorLayout("BF16", (rows, 1) if cls.per_row else (1,)),
        }

    @classmethod
    def _encode(cls, weight):
        largest = np.abs(weight).max(axis=1, keepdims=True) if cls.per_row else np.abs(weight).max().reshape(1)
        scale = largest / cls.number.max
        stored = bfloat16_scale(scale)
        return {"weight": cls.number.encode(weight / bfloat16_decode(stored)), "weight_scale": stored}

    @classmethod
    def _parts(cls, tensors, shape):
        scale = np.broadcast_to(bfloat16_decode(tensors["weight_scale"]).reshape(-1, 1), (shape[0], 1))
        return Parts(cls.element.upper(), tensors["weight"], cls.number.values, scale, "BF16")


class FP8(_FP8):
    """E4M3 with one scale for the tensor."""

    name = "FP8"


class FP8_CHANNEL(_FP8):
    """E4M3 with a scale for each row: what llm-compressor's FP8_DYNAMIC makes of weights."""

    name, per_row = "FP8_CHANNEL", True


class FP8_E5M2(_FP8):
    """E5M2 with one scale for the tensor: twice the rounding error of E4M3 and more range, for experiments."""

    name, element, number = "FP8_E5M2", "e5m2", E5M2
    loads_in = ()
    source = "FP8 Formats for Deep Learning, arXiv 2209.05433; tensors named as for FP8"


class FP8_BLOCK(TensorFormat):
    """E4M3 with a float32 scale for each block of 128 × 128 weights, as DeepSeek-V3 is published.

    Only whole blocks: DeepSeek cuts the last ones short, but transformers' dequantization takes the block's
    size from the number of scales and would read those wrongly.
    """

    name, element, element_bits, group = "FP8_BLOCK", "e4m3", 8, BLOCK
    loads_in = ("transformers", "vLLM")
    source = "DeepSeek-V3 README_WEIGHTS.md; transformers 5.23, integrations/finegrained_fp8.py (Fp8Quantize)"

    @classmethod
    def _misfit(cls, shape):
        if reason := super()._misfit(shape):
            return reason
        return f"{shape[0]} rows are not a multiple of the block of {BLOCK}" if shape[0] % BLOCK else ""

    @classmethod
    def _layout(cls, rows, columns):
        return {
            "weight": TensorLayout("F8_E4M3", (rows, columns)),
            "weight_scale_inv": TensorLayout("F32", (rows // BLOCK, columns // BLOCK)),
        }

    @classmethod
    def _encode(cls, weight):
        blocks = _blocks(weight)
        largest = np.abs(blocks).max(axis=(1, 3))
        # A reciprocal and a product, which is what torch makes of a number over a tensor.
        scale = np.where(largest > 0, np.minimum(F32(1) / largest * E4M3.max, np.finfo(F32).max), F32(1))
        inverse = F32(1) / scale
        finite_scale(cls, inverse, "float32")
        return {"weight": E4M3.encode(blocks * _spread(scale)).reshape(weight.shape), "weight_scale_inv": inverse}

    @classmethod
    def _parts(cls, tensors, shape):
        scale = np.repeat(tensors["weight_scale_inv"], BLOCK, axis=0)
        return Parts("E4M3", tensors["weight"], E4M3.values, scale, "F32")


def _blocks(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A view of a matrix as (block rows, 128, block columns, 128)."""
    return weight.reshape(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)


def _spread(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales (block rows, block columns) against ``_blocks``."""
    return scale[:, None, :, None]
