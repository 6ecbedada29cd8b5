"""Integer codes with a scale, and a zero point where asymmetric: INT8 rows and INT4 groups in three layouts.

A row of the weight belongs to one output. compressed-tensors packs codes along the row; GPTQ and AWQ store the
weight transposed, (inputs, outputs). A group's range always includes zero here. GPTQModel's symmetric rule and
AutoAWQ's forget that where all weights of a group have one sign, and would clip them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError
from quantkit.formats.tensors import words
from quantkit.formats.tensors.base import F32, TensorFormat, TensorLayout, bfloat16_scale, finite_scale
from quantkit.formats.tensors.minifloat import bfloat16_decode
from quantkit.formats.tensors.parts import WHOLE, Parts

PER_WORD = 8  # four-bit codes in 32 bits
HALF_TINY = np.float16(2**-24)  # the smallest positive half: a scale that would round to zero


def _extremes(weight: npt.NDArray[np.float32], group: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Smallest and largest of every group and of zero, float32 (rows, groups)."""
    grouped = weight.reshape(len(weight), -1, group)
    return np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)


def _scaled(weight: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Every weight over its group's scale (rows, groups): float32 (rows, groups, group)."""
    return weight.reshape(*scale.shape, -1) / scale[:, :, None]


def _apart(codes: npt.NDArray[np.uint8], zero: npt.NDArray[np.uint8] | None, scale: npt.NDArray[np.float32], kind: str) -> Parts:
    """Four-bit codes whose zero points are integers (rows, groups), or 8 everywhere (None)."""
    zero = None if zero is None or (zero == 8).all() else zero
    element = "INT4" if zero is None else "UINT4"
    return Parts(element, codes, WHOLE[element], scale, kind, zero)


class INT8(TensorFormat):
    """w = s · q with one scale for each row; q a signed byte.

    The configuration must give its group the format ``int-quantized``: alone, eight-bit weights mean packed ones.
    """

    name, element, element_bits = "INT8", "int8", 8
    loads_in = ("transformers", "vLLM")
    source = "compressed-tensors 0.20 (int-quantized; quantization/utils/helpers.py, calculate_qparams), preset INT8"

    @classmethod
    def _layout(cls, rows, columns):
        return {"weight": TensorLayout("I8", (rows, columns)), "weight_scale": TensorLayout("BF16", (rows, 1))}

    @classmethod
    def _encode(cls, weight):
        scale = np.abs(weight).max(axis=1, keepdims=True) / F32(127.5)
        stored = bfloat16_scale(scale)
        codes = np.clip(np.rint(weight / bfloat16_decode(stored)), -128, 127).astype(np.int8)
        return {"weight": codes, "weight_scale": stored}

    @classmethod
    def _parts(cls, tensors, shape):
        codes = np.ascontiguousarray(tensors["weight"]).view(np.uint8)
        return Parts("INT8", codes, WHOLE["INT8"], bfloat16_decode(tensors["weight_scale"]), "BF16")


class _PackQuantized(TensorFormat):
    """w = s · (q − z): compressed-tensors' ``pack-quantized``, eight codes of a row in 32 bits.

    With zero points, transformers 5.23 loads it only under ``CompressedTensorsConfig(dequantize=True)``.
    """

    element, element_bits = "int4", 4
    loads_in = ("transformers", "vLLM")
    source = "compressed-tensors 0.20 (pack-quantized; quantization/utils/helpers.py, calculate_qparams), preset W4A16"

    @classmethod
    def _layout(cls, rows, columns):
        groups = columns // cls.group
        out = {
            "weight_packed": TensorLayout("I32", (rows, -(-columns // PER_WORD))),
            "weight_scale": TensorLayout("BF16", (rows, groups)),
            "weight_shape": TensorLayout("I64", (2,)),
        }
        if not cls.symmetric:
            out["weight_zero_point"] = TensorLayout("I32", (-(-rows // PER_WORD), groups))
        return out

    @classmethod
    def _encode(cls, weight):
        low, high = _extremes(weight, cls.group)
        scale = np.maximum(-low, high) / F32(7.5) if cls.symmetric else (high - low) / F32(15)
        finite_scale(cls, scale, "bfloat16")
        zero = np.full(scale.shape, 8, np.uint8)  # as stored: 8 more than the signed zero point
        if not cls.symmetric:
            zero = np.where(scale == 0, F32(8), np.rint(np.clip(-low / scale, 0, 15))).astype(np.uint8)
        stored = bfloat16_scale(scale)
        codes = _scaled(weight, bfloat16_decode(stored)) + (zero.astype(F32) - 8)[:, :, None]
        codes = (np.rint(np.clip(codes, -8, 7)) + 8).astype(np.uint8).reshape(weight.shape)
        out = {
            "weight_packed": words.pack(codes, 4, "<i4"),
            "weight_scale": stored,
            "weight_shape": np.array(weight.shape, np.int64),
        }
        if not cls.symmetric:
            out["weight_zero_point"] = np.ascontiguousarray(words.pack(zero.T, 4, "<i4").T)
        return out

    @classmethod
    def _parts(cls, tensors, shape):
        found = tensors["weight_shape"].tolist()
        if found != list(shape):
            raise FormatError(f"{cls.name}'s tensor 'weight_shape' says {found} and should say {list(shape)}")
        codes = words.unpack(tensors["weight_packed"], 4, shape[1])
        zero = None if cls.symmetric else words.unpack(tensors["weight_zero_point"].T, 4, shape[0]).T
        return _apart(codes, zero, bfloat16_decode(tensors["weight_scale"]), "BF16")


class W4A16(_PackQuantized):
    """Groups of 128, symmetric: llm-compressor's preset of that name."""

    name, group = "W4A16", 128


class W4A16_G32(_PackQuantized):
    """Groups of 32, symmetric."""

    name, group = "W4A16_G32", 32


class W4A16_ASYM(_PackQuantized):
    """Groups of 128 with zero points: llm-compressor's preset of that name."""

    name, group, symmetric = "W4A16_ASYM", 128, False


class W4A16_ASYM_G32(_PackQuantized):
    """Groups of 32 with zero points."""

    name, group, symmetric = "W4A16_ASYM_G32", 32, False


class _Transposed(TensorFormat):
    """w = s · (q − z) with half-precision scales, stored (inputs, outputs); what GPTQ and AWQ share."""

    element, element_bits = "int4", 4
    loads_in = ("transformers", "vLLM")

    @classmethod
    def _misfit(cls, shape):
        if reason := super()._misfit(shape):
            return reason
        return f"{shape[0]} rows are not a multiple of the {PER_WORD} zero points in a word" if shape[0] % PER_WORD else ""

    @classmethod
    def _half(cls, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
        """Scales as they are stored. Raises FormatError beyond half precision."""
        stored = scale.astype(np.float16)
        finite_scale(cls, stored, "float16")
        return np.maximum(stored, HALF_TINY)

    @classmethod
    def _codes(cls, weight: npt.NDArray[np.float32], stored: npt.NDArray[np.float16], zero: np.ndarray) -> npt.NDArray[np.uint8]:
        """Nearest codes, uint8 (rows, columns): both libraries round before they add the zero point."""
        codes = np.rint(_scaled(weight, stored.astype(F32))) + zero.astype(F32)[:, :, None]
        return np.clip(codes, 0, 15).astype(np.uint8).reshape(weight.shape)


class _GPTQ(_Transposed):
    """GPTQ's checkpoint format 1, which all programs read: stored zero points are one less than those used.

    Zero point 0 has no place there (programs read the stored 15 as 16 or as 0), so it is never written: a
    group without negative weights takes zero point 1 and spreads its range over fourteen steps.
    """

    source = "GPTQModel 7.7 (quantization/quantizer.py; nn_modules/qlinear, pack and dequantize_weight); GPTQ, arXiv 2210.17323"

    @classmethod
    def _layout(cls, rows, columns):
        groups = columns // cls.group
        return {
            "qweight": TensorLayout("I32", (columns // PER_WORD, rows)),
            "qzeros": TensorLayout("I32", (groups, rows // PER_WORD)),
            "scales": TensorLayout("F16", (groups, rows)),
            "g_idx": TensorLayout("I32", (columns,)),
        }

    @classmethod
    def _encode(cls, weight):
        low, high = _extremes(weight, cls.group)
        if cls.symmetric:
            high = np.maximum(-low, high)
            low = -high
        empty = (low == 0) & (high == 0)
        low, high = np.where(empty, F32(-1), low), np.where(empty, F32(1), high)
        scale = (high - low) / F32(15)
        zero = np.rint(-low / scale) if not cls.symmetric else np.full(scale.shape, 8, F32)
        scale = np.where(zero == 0, high / F32(14), scale)
        zero = np.maximum(zero, 1)
        stored = cls._half(scale)
        codes = cls._codes(weight, stored, zero)
        return {
            "qweight": np.ascontiguousarray(words.pack(codes, 4, "<i4").T),
            "qzeros": words.pack((zero - 1).astype(np.uint8).T, 4, "<i4"),
            "scales": np.ascontiguousarray(stored.T),
            "g_idx": (np.arange(weight.shape[1]) // cls.group).astype(np.int32),
        }

    @classmethod
    def _parts(cls, tensors, shape):
        g_idx, scale = tensors["g_idx"], tensors["scales"].astype(F32).T
        wrong = g_idx[(g_idx < 0) | (g_idx >= scale.shape[1])]
        if wrong.size:
            raise FormatError(f"{cls.name}'s tensor 'g_idx' names group {wrong[0]} of {scale.shape[1]}")
        codes = words.unpack(tensors["qweight"].T, 4, shape[1])
        zero = words.unpack(tensors["qzeros"], 4, shape[0]).T + 1
        if not np.array_equal(g_idx, np.arange(shape[1]) // cls.group):  # activation order: a scale for each weight
            zero, scale = zero[:, g_idx], scale[:, g_idx]
        return _apart(codes, zero, scale, "F16")


class GPTQ_INT4_G128(_GPTQ):
    """Groups of 128, symmetric."""

    name, group = "GPTQ_INT4_G128", 128


class GPTQ_INT4_G32(_GPTQ):
    """Groups of 32, symmetric."""

    name, group = "GPTQ_INT4_G32", 32


class GPTQ_INT4_ASYM_G128(_GPTQ):
    """Groups of 128 with zero points."""

    name, group, symmetric = "GPTQ_INT4_ASYM_G128", 128, False


class GPTQ_INT4_ASYM_G32(_GPTQ):
    """Groups of 32 with zero points."""

    name, group, symmetric = "GPTQ_INT4_ASYM_G32", 32, False


class _AWQ(_Transposed):
    """AutoAWQ's GEMM version: always with zero points, codes of eight outputs interleaved in a word."""

    symmetric = False
    source = "AutoAWQ 0.2.9 (quantize/quantizer.py, pseudo_quantize_tensor; modules/linear/gemm.py); AWQ, arXiv 2306.00978"

    @classmethod
    def _layout(cls, rows, columns):
        groups = columns // cls.group
        return {
            "qweight": TensorLayout("I32", (columns, rows // PER_WORD)),
            "qzeros": TensorLayout("I32", (groups, rows // PER_WORD)),
            "scales": TensorLayout("F16", (groups, rows)),
        }

    @classmethod
    def _encode(cls, weight):
        low, high = _extremes(weight, cls.group)
        scale = np.maximum(high - low, F32(1e-5)) / F32(15)
        zero = np.clip(-np.rint(low / scale), 0, 15).astype(np.uint8)
        stored = cls._half(scale)
        codes = cls._codes(weight, stored, zero)
        return {
            "qweight": words.pack(codes.T, 4, "<i4", words.AWQ),
            "qzeros": words.pack(zero.T, 4, "<i4", words.AWQ),
            "scales": np.ascontiguousarray(stored.T),
        }

    @classmethod
    def _parts(cls, tensors, shape):
        codes = words.unpack(tensors["qweight"], 4, shape[0], words.AWQ).T
        zero = words.unpack(tensors["qzeros"], 4, shape[0], words.AWQ).T
        return _apart(codes, zero, tensors["scales"].astype(F32).T, "F16")


class AWQ_INT4_G128(_AWQ):
    """Groups of 128."""

    name, group = "AWQ_INT4_G128", 128


class AWQ_INT4_G32(_AWQ):
    """Groups of 32."""

    name, group = "AWQ_INT4_G32", 32
