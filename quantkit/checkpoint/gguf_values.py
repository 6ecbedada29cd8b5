"""Typed metadata values of GGUF and their bytes.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", I64: "<q", F64: "<d"}
NUMPY = {
    U8: "u1",
    I8: "i1",
    U16: "<u2",
    I16: "<i2",
    U32: "<u4",
    I32: "<i4",
    F32: "<f4",
    BOOL: "?",
    U64: "<u8",
    I64: "<i8",
    F64: "<f8",
}


@dataclass(frozen=True)
class Value:
    """A metadata value with its GGUF type; arrays carry the type of their items."""

    type: int
    value: Any
    item_type: int | None = None

    def packed(self) -> bytes:
        """The bytes of the value as they stand in a file, without the type tag."""
        if self.type != ARRAY:
            return _pack(self.type, self.value)
        assert self.item_type is not None
        head = struct.pack("<IQ", self.item_type, len(self.value))
        if self.item_type == STRING:
            return head + b"".join(_pack(STRING, item) for item in self.value)
        return head + np.asarray(self.value, dtype=NUMPY[self.item_type]).tobytes()


def _pack(kind: int, value: Any) -> bytes:
    if kind == STRING:
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        return struct.pack("<Q", len(raw)) + raw
    return struct.pack(SCALARS[kind], value)


def u32(value: int) -> Value:
    """An unsigned 32-bit number."""
    return Value(U32, int(value))


def f32(value: float) -> Value:
    """A single-precision number."""
    return Value(F32, float(value))


def boolean(value: bool) -> Value:
    """A truth value."""
    return Value(BOOL, bool(value))


def string(value: str) -> Value:
    """A UTF-8 string."""
    return Value(STRING, value)


def array(item_type: int, values: Any) -> Value:
    """An array whose items share a type."""
    return Value(ARRAY, values, item_type)


Metadata = dict[str, Value]


def plain(metadata: Metadata) -> dict[str, Any]:
    """Metadata without type tags: key → Python value."""
    return {key: value.value for key, value in metadata.items()}
