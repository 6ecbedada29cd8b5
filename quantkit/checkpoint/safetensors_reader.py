"""A strict reader of safetensors files.

Specification: https://github.com/huggingface/safetensors#format — eight bytes of header length, a JSON
header of at most 100 MB, then the data without holes or overlaps. Everything is checked before use.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.files import PositionedFile
from quantkit.errors import CheckpointError

MAX_HEADER = 100_000_000
# name → (NumPy type of the stored bits, quantkit's name of the float format or None)
DTYPES: dict[str, tuple[str, str | None]] = {
    "F32": ("<f4", "F32"), "F16": ("<f2", "F16"), "BF16": ("<u2", "BF16"), "F64": ("<f8", "F64"),
    "I64": ("<i8", None), "I32": ("<i4", None), "I16": ("<i2", None), "I8": ("i1", None), "U8": ("u1", None),
    "BOOL": ("u1", None), "F8_E4M3": ("u1", None), "F8_E5M2": ("u1", None), "U16": ("<u2", None), "U32": ("<u4", None),
    "U64": ("<u8", None),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its stored type, shape and byte range (absolute)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.start


class SafetensorsFile:
    """One safetensors file; ``entries`` maps names to :class:`Entry`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = PositionedFile(path)
        self.file.refuse_lfs_pointer()
        self.entries = self._parse()

    def _fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {what}", hint="the file is damaged; download it again")

    def _parse(self) -> dict[str, Entry]:
        if self.file.size < 8:
            raise self._fail(f"{self.file.size} bytes are too few for a safetensors header")
        length = int.from_bytes(self.file.read(0, 8), "little")
        if length > MAX_HEADER or 8 + length > self.file.size:
            raise self._fail(f"header length {length} is impossible in a file of {self.file.size} bytes")
        try:
            header = json.loads(bytes(self.file.read(8, length)), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"the header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._fail("the header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        self._check_coverage(entries, 8 + length)
        return entries

    def _entry(self, name: str, value: object, base: int) -> Entry:
        try:
            dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]  # type: ignore[index]
            ints = [start, end, *shape]
        except (TypeError, KeyError, ValueError):
            raise self._fail(f"tensor {name!r} has no dtype, shape and data_offsets") from None
        if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in ints):
            raise self._fail(f"tensor {name!r} has a negative or non-integer shape or offset: {ints}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._fail(f"tensor {name!r} has the unknown dtype {dtype!r}")
        need = math.prod(shape) * np.dtype(DTYPES[dtype][0]).itemsize
        if end < start or end - start != need:
            raise self._fail(f"tensor {name!r} of shape {shape} needs {need} bytes but its range is {start}…{end}")
        if base + end > self.file.size:
            raise self._fail(f"tensor {name!r} ends at byte {base + end} of a file of {self.file.size} bytes")
        return Entry(dtype, tuple(shape), base + start, base + end)

    def _check_coverage(self, entries: dict[str, Entry], base: int) -> None:
        position = base
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != position:
                kind = "overlaps its neighbour" if entry.start < position else "leaves a hole before it"
                raise self._fail(f"tensor {name!r} at byte {entry.start} {kind} (expected {position})")
            position = entry.end
        if position != self.file.size:
            raise self._fail(f"{self.file.size - position} bytes after the last tensor")

    def read_bits(self, name: str) -> np.ndarray:
        """A whole tensor in its own shape, as the NumPy type of its stored bits."""
        entry = self.entries[name]
        raw = np.empty(entry.shape, np.dtype(DTYPES[entry.dtype][0]))
        self.file.read_into(entry.start, raw.reshape(-1).view(np.uint8).data)
        return raw

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start…stop of a float tensor as float32; a vector counts as one row.

        The shape is viewed as (rows, last axis). Raises CheckpointError for integer tensors.
        """
        entry = self.entries[name]
        stored, kind = DTYPES[entry.dtype]
        if kind is None:
            raise CheckpointError(
                f"{self.path.name}: {name} has dtype {entry.dtype}", hint="quantkit reads F32, F16, BF16 and F64 weights"
            )
        columns = entry.shape[-1] if entry.shape else 1
        raw = np.empty((stop - start, columns), np.dtype(stored))
        offset = entry.start + start * columns * raw.itemsize
        self.file.read_into(offset, raw.reshape(-1).view(np.uint8).data)
        if kind == "BF16":
            bits = raw.astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        return raw.astype(np.float32, copy=False)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} occurs twice")
    return found
