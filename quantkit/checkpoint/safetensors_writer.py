"""Writes safetensors files whose tensors are announced first and then filled in any order, piece by piece.

Specification: https://github.com/huggingface/safetensors#format. As in that library, tensors lie in order of
falling item size and then of name, so that each is aligned in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.checkpoint.safetensors_reader import DTYPES

INDEX = "model.safetensors.index.json"
CHUNK = 1 << 22
ENTRY_BYTES = 128  # room for a tensor's entry in the header, without its name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written; dtype is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return np.dtype(DTYPES[self.dtype][0]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def room(self) -> int:
        """Bytes that it takes in a file at most, header included."""
        return self.nbytes + ENTRY_BYTES + len(json.dumps(self.name))


class SafetensorsWriter:
    """One new file. ``write`` takes pieces in any order; ``close`` refuses to end with some missing."""

    def __init__(self, path: Path, tensors: Iterable[StoredTensor]) -> None:
        self._offsets: dict[str, int] = {}
        self._left: dict[str, int] = {}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in sorted(tensors, key=lambda t: (-t.item_bytes, t.name)):
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
            self._offsets[tensor.name], self._left[tensor.name] = at, tensor.nbytes
            at += tensor.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._base = 8 + len(header)
        self.size = self._base + at
        self._handle = open(path, "w+b")  # noqa: SIM115 (closed by close)
        self._handle.write(len(header).to_bytes(8, "little") + header)
        self._handle.flush()
        os.ftruncate(self._handle.fileno(), self.size)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            missing = [name for name, left in self._left.items() if left]
            if missing:
                raise ValueError(f"{len(missing)} tensors were not written, first {missing[0]}")
        self._handle.close()

    def write(self, name: str, data: np.ndarray, at: int = 0) -> None:
        """Put bytes of a tensor at ``at`` bytes from its beginning."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        self._left[name] -= view.nbytes
        if self._left[name] < 0:
            raise ValueError(f"{name}: {-self._left[name]} bytes more than announced")
        start = self._base + self._offsets[name] + at
        while view:
            done = os.pwrite(self._handle.fileno(), view, start)
            start, view = start + done, view[done:]

    def sync(self) -> str:
        """Make the file lasting; returns its SHA-256, read back."""
        os.fsync(self._handle.fileno())
        digest = hashlib.sha256()
        self._handle.seek(0)
        while part := self._handle.read(CHUNK):
            digest.update(part)
        return digest.hexdigest()


def into_shards(groups: list[list[StoredTensor]], limit: int) -> list[list[list[StoredTensor]]]:
    """Groups of tensors in files of at most ``limit`` bytes; a group is never parted, so a large one may exceed it."""
    shards: list[list[list[StoredTensor]]] = []
    size = limit
    for group in groups:
        room = sum(tensor.room for tensor in group)
        if not shards or size + room > limit:
            shards.append([])
            size = ENTRY_BYTES
        shards[-1].append(group)
        size += room
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers writes them."""
    return ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_json(shards: dict[str, list[StoredTensor]]) -> str:
    """The index of a model in several files: file name → its tensors."""
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)
