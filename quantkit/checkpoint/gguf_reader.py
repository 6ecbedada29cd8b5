"""A strict GGUF reader: every count, length and offset is checked before it is used.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The known weaknesses of GGUF
parsers (integer overflow, reads past the file, overlapping tensors) are what the checks are for.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.files import PositionedFile
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats import Format, format_by_gguf_id

MAX_HEADER = 1 << 30
MAX_STRING = 1 << 26
MAX_ITEMS = 1 << 24
GGML_NAMES = {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}  # fmt: skip


def type_name(gguf_id: int) -> str:
    """ggml's name of a type number that quantkit has no format for."""
    return GGML_NAMES.get(gguf_id, f"type {gguf_id}")


@dataclass(frozen=True)
class GgufEntry:
    """One tensor: format, shape as NumPy orders it (last axis contiguous), absolute byte range."""

    format: type[Format] | None
    gguf_id: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFile:
    """One GGUF file: ``metadata`` (typed, in order), ``entries`` and positioned reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = PositionedFile(path)
        self.file.refuse_lfs_pointer()
        self._position = 0
        self._buffer = b""
        self._buffer_start = 0
        self.metadata: gv.Metadata = {}
        self.entries: dict[str, GgufEntry] = {}
        self._parse()
        self._buffer = b""

    def _fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {what}", hint="the file is damaged; download or convert it again")

    # -- header ---------------------------------------------------------------------------------

    def _take(self, length: int) -> bytes:
        if self._position + length > min(self.file.size, MAX_HEADER):
            raise self._fail(f"the header runs past byte {min(self.file.size, MAX_HEADER)} (truncated?)")
        inside = self._position - self._buffer_start
        if inside + length > len(self._buffer):
            size = min(max(length, 1 << 20), self.file.size - self._position)
            self._buffer = bytes(self.file.read(self._position, size))
            self._buffer_start, inside = self._position, 0
        self._position += length
        return self._buffer[inside : inside + length]

    def _number(self, kind: int) -> int:
        layout = gv.SCALARS[kind]
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        length = self._number(gv.U64)
        if length > MAX_STRING:
            raise self._fail(f"a string of {length} bytes at byte {self._position}")
        return self._take(length).decode("utf-8", "surrogateescape")

    def _value(self) -> gv.Value:
        kind = self._number(gv.U32)
        if kind == gv.STRING:
            return gv.Value(kind, self._string())
        if kind != gv.ARRAY:
            if kind not in gv.SCALARS:
                raise self._fail(f"unknown metadata type {kind} at byte {self._position - 4}")
            return gv.Value(kind, self._number(kind))
        item, count = self._number(gv.U32), self._number(gv.U64)
        if item == gv.STRING:
            if count * 8 > self.file.size or count > MAX_ITEMS:
                raise self._fail(f"an array of {count} strings does not fit the file")
            return gv.Value(kind, [self._string() for _ in range(count)], item)
        if item not in gv.NUMPY:
            raise self._fail(f"unknown array type {item} at byte {self._position - 12}")
        dtype = np.dtype(gv.NUMPY[item])
        if count * dtype.itemsize > self.file.size or count > MAX_ITEMS:
            raise self._fail(f"an array of {count} items does not fit the file")
        return gv.Value(kind, np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist(), item)

    def _parse(self) -> None:
        if self.file.size < 24 or self._take(4) != gv.MAGIC:
            raise self._fail("not a GGUF file (wrong magic)")
        version = self._number(gv.U32)
        if version not in (2, 3):
            hint = " (big-endian files are not supported)" if version in (0x02000000, 0x03000000) else ""
            raise self._fail(f"GGUF version {version} is not supported{hint}")
        n_tensors, n_values = self._number(gv.U64), self._number(gv.U64)
        if n_tensors * 24 > self.file.size or n_values * 13 > self.file.size:
            raise self._fail(f"{n_tensors} tensors and {n_values} metadata values do not fit the file")
        for _ in range(n_values):
            key = self._string()
            if key in self.metadata:
                raise self._fail(f"metadata key {key!r} occurs twice")
            self.metadata[key] = self._value()
        raw = [self._tensor_info() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", gv.u32(gv.DEFAULT_ALIGNMENT)).value
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._fail(f"alignment {alignment} is not a power of two")
        self.alignment = alignment
        self.data_start = -(-self._position // alignment) * alignment
        for name, shape, gguf_id, offset in raw:
            self._add(name, shape, gguf_id, offset)
        self._check_overlaps()

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n_dims = self._number(gv.U32)
        if not 1 <= n_dims <= 4:
            raise self._fail(f"tensor {name!r} has {n_dims} dimensions")
        dims = tuple(self._number(gv.U64) for _ in range(n_dims))
        return name, dims[::-1], self._number(gv.U32), self._number(gv.U64)

    def _add(self, name: str, shape: tuple[int, ...], gguf_id: int, offset: int) -> None:
        if name in self.entries:
            raise self._fail(f"tensor {name!r} occurs twice")
        if math.prod(shape) <= 0 or math.prod(shape) > 1 << 60:
            raise self._fail(f"tensor {name!r} has the impossible shape {shape}")
        if offset % self.alignment:
            raise self._fail(f"tensor {name!r} at offset {offset} is not aligned to {self.alignment} bytes")
        fmt = format_by_gguf_id(gguf_id)
        if fmt is None:
            if gguf_id > 64:
                raise self._fail(f"tensor {name!r} has the unknown type {gguf_id}")
            self.entries[name] = GgufEntry(None, gguf_id, shape, self.data_start + offset, 0)
            return
        try:
            nbytes = fmt.row_bytes(shape[-1]) * math.prod(shape[:-1])
        except FormatError as error:
            raise self._fail(f"tensor {name!r}: {error.what}") from None
        if self.data_start + offset + nbytes > self.file.size:
            end = self.data_start + offset + nbytes
            raise self._fail(f"tensor {name!r} ends at byte {end} of a file of {self.file.size} bytes (truncated?)")
        self.entries[name] = GgufEntry(fmt, gguf_id, shape, self.data_start + offset, nbytes)

    def _check_overlaps(self) -> None:
        end, before = 0, ""
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if entry.start < end:
                raise self._fail(f"tensors {before!r} and {name!r} overlap at byte {entry.start}")
            end, before = entry.start + entry.nbytes, name

    # -- data -----------------------------------------------------------------------------------

    def read_packed(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Packed bytes of rows start…stop, uint8 (rows, bytes per row); leading axes count as rows."""
        entry = self.entries[name]
        if entry.format is None:
            kind = type_name(entry.gguf_id)
            raise CheckpointError(
                f"{self.path.name}: {name} has type {kind}, which quantkit cannot read yet",
                hint="start from a BF16, F16 or F32 file",
            )
        row = entry.format.row_bytes(entry.shape[-1])
        out = np.empty((stop - start, row), np.uint8)
        self.file.read_into(entry.start + start * row, out.reshape(-1).data)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start…stop decoded to float32 (rows, columns)."""
        fmt = self.entries[name].format
        packed = self.read_packed(name, start, stop)
        assert fmt is not None
        return fmt.decode(packed)
