"""ggml's own C code as the judge of bytes: ``libggml-base`` built without contraction."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import build_llama

REQUIRED = os.environ.get("QUANTKIT_REQUIRE_ORACLES") == "1"
SHARED = Path(__file__).parent.parent.parent / "shared"
FLOAT_P = ctypes.POINTER(ctypes.c_float)


def missing(what: str):
    """Skip the test, or fail it where the oracles are required."""
    if REQUIRED:
        pytest.fail(f"{what} is missing, and QUANTKIT_REQUIRE_ORACLES=1")
    pytest.skip(f"{what} is missing; `make test` builds it")


def library(kind: str = "oracle") -> ctypes.CDLL:
    """``libggml-base`` of the ``oracle`` or the ``runtime`` build."""
    path = build_llama.cache_dir() / kind / "libggml-base.so"
    if not path.exists():
        missing(str(path))
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, FLOAT_P, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOAT_P,
    ]  # fmt: skip
    return lib


def encode(lib: ctypes.CDLL, gguf_id: int, row_bytes: int, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """``ggml_quantize_chunk`` on a float32 matrix; returns uint8 (rows, bytes)."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros((x.shape[0], row_bytes), np.uint8)
    qw = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data_as(FLOAT_P)
    lib.ggml_quantize_chunk(gguf_id, x.ctypes.data_as(FLOAT_P), out.ctypes.data, 0, x.shape[0], x.shape[1], qw)
    return out


def decode(lib: ctypes.CDLL, function: str, packed: np.ndarray, elements: int) -> np.ndarray:
    """``dequantize_row_*`` on packed rows; returns float32 (rows, elements)."""
    out = np.full((len(packed), elements), np.nan, np.float32)
    call = getattr(lib, function)
    call.restype, call.argtypes = None, [ctypes.c_void_p, FLOAT_P, ctypes.c_int64]
    packed = np.ascontiguousarray(packed)
    call(packed.ctypes.data, out.ctypes.data_as(FLOAT_P), packed.shape[0] * elements)
    return out
