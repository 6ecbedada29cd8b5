"""An atomic, streaming GGUF writer. The size is known before the first byte is written.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.files import atomic_file
from quantkit.formats import Format


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, shape as NumPy orders it, format."""

    name: str
    shape: tuple[int, ...]
    format: type[Format]

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return self.format.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


def padded(size: int, alignment: int = gv.DEFAULT_ALIGNMENT) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // alignment) * alignment


def header_bytes(metadata: gv.Metadata, tensors: list[TensorSpec]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    out = bytearray(gv.MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += gv.string(key).packed() + struct.pack("<I", value.type) + value.packed()
    offset = 0
    for tensor in tensors:
        out += gv.string(tensor.name).packed()
        out += struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        out += struct.pack("<IQ", tensor.format.gguf_id, offset)
        offset += padded(tensor.nbytes)
    out += bytes(padded(len(out)) - len(out))
    return bytes(out)


def file_bytes(metadata: gv.Metadata, tensors: list[TensorSpec]) -> int:
    """Size of the whole file: header, data and padding."""
    return len(header_bytes(metadata, tensors)) + sum(padded(t.nbytes) for t in tensors)


class GgufWriter:
    """Accepts the data of the announced tensors in order, in pieces of any size."""

    def __init__(self, handle: BinaryIO, metadata: gv.Metadata, tensors: list[TensorSpec]) -> None:
        self.handle = handle
        self._pending = list(tensors)
        self._written = 0
        self._header = header_bytes(metadata, tensors)
        self._tensors = tensors
        handle.write(self._header)

    def write(self, name: str, data: np.ndarray) -> None:
        """Append packed bytes (uint8) of the tensor whose turn it is; pads when it is complete."""
        spec = self._pending[0]
        if spec.name != name:
            raise ValueError(f"expected data of {spec.name}, got {name}")
        self.handle.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._written += data.nbytes
        if self._written > spec.nbytes:
            raise ValueError(f"{name}: {self._written} bytes written, {spec.nbytes} announced")
        if self._written == spec.nbytes:
            self.handle.write(bytes(padded(spec.nbytes) - spec.nbytes))
            self._pending.pop(0)
            self._written = 0

    def replace_metadata(self, metadata: gv.Metadata) -> None:
        """Rewrite the header with values known only now; its length must not change."""
        header = header_bytes(metadata, self._tensors)
        if len(header) != len(self._header):
            raise ValueError("the header changed its length")
        position = self.handle.tell()
        self.handle.seek(0)
        self.handle.write(header)
        self.handle.seek(position)

    def finish(self) -> None:
        """Check that nothing is missing."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors were not written, first {self._pending[0].name}")


@contextlib.contextmanager
def write_gguf(path: Path, metadata: gv.Metadata, tensors: list[TensorSpec]) -> Iterator[GgufWriter]:
    """A writer whose file appears under ``path`` only when every tensor was written.

    Raises OutputError if the disk is too small or the folder cannot be written.
    """
    with atomic_file(path, expected_bytes=file_bytes(metadata, tensors)) as handle:
        writer = GgufWriter(handle, metadata, tensors)
        yield writer
        writer.finish()
