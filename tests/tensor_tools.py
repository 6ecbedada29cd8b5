"""Weights, types and comparisons that the tests of multi-tensor formats share."""

from __future__ import annotations

import importlib

import numpy as np
import oracle
import torch

from quantkit.formats.tensors import TensorFormat, tensor_formats

FORMATS = tensor_formats()
NAMES = [f.name for f in FORMATS]
SHAPE = (128, 256)  # fits every format
TORCH = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
WORDS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}
FOUR_BIT = ["NF4", "NF4_DQ", "FP4", "FP4_DQ"]


def library(name: str):
    """An installed library, or the test skipped (failed where oracles are required)."""
    try:
        return importlib.import_module(name)
    except ImportError:
        oracle.missing(name)


def weights(shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Rows of very different size, with outliers, a row of zeros, one of a single sign, and exact ties."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * np.exp(rng.uniform(-6, 2, (shape[0], 1)))
    w[rng.random(shape) < 0.002] *= 20
    if shape[0] >= 8:
        w[2] = 0
        w[3] = np.abs(w[3])
        w[4] = np.resize(np.arange(-15, 16) / 4, shape[1])
        w[5, ::3] = -0.0
        w[6, :32] = 1e-30
    return w.astype(np.float32)


def as_torch(fmt: type[TensorFormat], tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Encoded tensors in their own torch types."""
    out = {}
    for name, layout in fmt.layout(shape).items():
        tensor = torch.from_numpy(tensors[name].copy())
        out[name] = tensor.view(TORCH[layout.dtype]) if layout.dtype in TORCH else tensor
    return out


def same(a, b) -> bool:
    """Equal type, shape and bits."""
    bits = [x.view(WORDS[x.element_size()]).numpy() if isinstance(x, torch.Tensor) else x for x in (a, b)]
    return tuple(a.shape) == tuple(b.shape) and bits[0].tobytes() == bits[1].tobytes()


def bits_of(value: int, low: int, count: int) -> int:
    """Bits low … low + count of an integer of any sign, one by one."""
    return sum(((value >> (low + i)) & 1) << i for i in range(count))
