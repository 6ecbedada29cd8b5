"""A checkpoint seen through exact changes of its tensors: rows and columns in another order, times powers of two.

A :class:`Transform` is data: it says for each tensor which row and column of the original stands where, and the
exponent of two that each row and column is multiplied with. Which changes leave the model's function as it is, is
known elsewhere (quantizer/fold_groups.py). Multiplying by a power of two is exact in every float format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.files import atomic_file
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.checkpoint.source import Checkpoint, CheckpointView, TensorInfo
from quantkit.errors import CheckpointError

GAP = 4  # rows of a permuted tensor that lie at most this far apart are read together
IDENTITY = "identity"  # name under which the file keeps the checkpoint's identity
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Change:
    """What happens to one tensor; each part is int32 (experts, rows) or (experts, columns), None where nothing does.

    new[e, r, c] = 2^(row_exponents[e, r] + column_exponents[e, c]) · old[e, row_order[e, r], column_order[e, c]].
    An ordinary matrix has one expert; a vector (norm, bias) is one row.
    """

    row_exponents: Ints | None = None
    column_exponents: Ints | None = None
    row_order: Ints | None = None
    column_order: Ints | None = None

    def parts(self) -> Iterator[tuple[str, Ints]]:
        """The arrays that are there, by name."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                yield entry.name, value

    def check(self, info: TensorInfo) -> None:
        """Raise CheckpointError if an array does not fit the tensor."""
        for part, value in self.parts():
            length = info.columns if part.startswith("column") else info.rows // info.experts
            good = value.shape == (info.experts, length)
            if good and part.endswith("order"):
                good = bool((np.sort(value, axis=1) == np.arange(length)).all())
            elif good:
                good = bool((np.abs(value) <= 64).all())
            if not good:
                raise CheckpointError(
                    f"the transform's {part} of {info.name} does not fit its shape {list(info.shape)}",
                    hint="it was made for another model; delete it to have it made again",
                )


@dataclass(frozen=True)
class Transform:
    """Changes by GGUF tensor name. identity: of the checkpoint that they were made for."""

    identity: str
    tensors: dict[str, Change] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """A hash of all that it says, 16 hexadecimal digits."""
        out = hashlib.sha256(self.identity.encode())
        for name, change in sorted(self.tensors.items()):
            for part, value in change.parts():
                out.update(f"{name} {part} {value.shape}".encode() + np.ascontiguousarray(value, "<i4").tobytes())
        return out.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write it as a safetensors file, atomically."""
        from safetensors.numpy import save

        arrays = {IDENTITY: np.frombuffer(self.identity.encode(), np.uint8)}
        for name, change in self.tensors.items():
            arrays |= {f"{name}/{part}": np.ascontiguousarray(value, np.int32) for part, value in change.parts()}
        with atomic_file(path) as handle:
            handle.write(save(arrays))

    @staticmethod
    def load(path: Path) -> Transform:
        """Read what :meth:`save` wrote. Raises CheckpointError if the file is damaged or something else."""
        file = SafetensorsFile(path)
        known = {entry.name for entry in fields(Change)}
        found: dict[str, dict[str, Ints]] = {}
        for key, entry in file.entries.items():
            name, _, part = key.rpartition("/")
            if key == IDENTITY and entry.dtype == "U8":
                continue
            if part not in known or entry.dtype != "I32" or len(entry.shape) != 2:
                raise CheckpointError(f"{path.name} is not a transform ({key})", hint="delete it to have it made again")
            found.setdefault(name, {})[part] = file.read_bits(key)
        if IDENTITY not in file.entries:
            raise CheckpointError(f"{path.name} does not say which model it is for", hint="delete it to have it made again")
        identity = file.read_bits(IDENTITY).tobytes().decode("ascii", "replace")
        return Transform(identity, {name: Change(**parts) for name, parts in found.items()})


class TransformedCheckpoint(CheckpointView):
    """A view of ``source`` with rescaled and reordered weights."""

    def __init__(self, source: Checkpoint, transform: Transform) -> None:
        """Raises CheckpointError if the transform was made for another model or does not fit."""
        if transform.identity != source.identity:
            raise CheckpointError(
                f"the transform was made for another model than {source.path.resolve().name}",
                hint="delete it to have it made again",
            )
        for name, change in transform.tensors.items():
            change.check(source.info(name))
        super().__init__(source)
        self.transform = transform

    @cached_property
    def identity(self) -> str:
        """Another one than the source's: the weights differ."""
        return hashlib.sha256(f"{self.source.identity} {self.transform.digest}".encode()).hexdigest()[:16]

    @property
    def original(self) -> str:
        return self.source.original

    @property
    def stamp(self) -> str:
        return hashlib.sha256(f"{self.source.stamp} {self.transform.digest}".encode()).hexdigest()[:16]

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        info, change = self.info(name), self.transform.tensors.get(name)
        if change is None:
            return self.source.read_rows(name, start, stop)
        per_expert = info.rows // info.experts
        pieces = []
        while start < stop:
            expert, row = divmod(start, per_expert)
            count = min(stop - start, per_expert - row)
            pieces.append(self._read_expert(name, change, expert, row, row + count, per_expert))
            start += count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read_expert(
        self, name: str, change: Change, expert: int, start: int, stop: int, per_expert: int
    ) -> npt.NDArray[np.float32]:
        """Rows start…stop of one expert, changed."""
        first = expert * per_expert
        if change.row_order is None:
            rows = self.source.read_rows(name, first + start, first + stop)
        else:
            rows = _gather(self.source, name, first + change.row_order[expert, start:stop].astype(np.int64))
        if change.column_order is not None:
            rows = rows[:, change.column_order[expert]]
        exponents = np.zeros((1, 1), np.int32)
        if change.row_exponents is not None:
            exponents = exponents + change.row_exponents[expert, start:stop, None]
        if change.column_exponents is not None:
            exponents = exponents + change.column_exponents[expert]
        return np.ldexp(rows, exponents)


def _gather(source: Checkpoint, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The given rows in the given order, read in runs so that at most GAP times as many pass through memory."""
    order = np.argsort(rows, kind="stable")
    wanted = rows[order]
    out = np.empty((len(rows), source.info(name).columns), np.float32)
    cuts = [0, *(np.flatnonzero(np.diff(wanted) > GAP) + 1).tolist(), len(wanted)]
    for a, b in pairwise(cuts):
        low = int(wanted[a])
        out[order[a:b]] = source.read_rows(name, low, int(wanted[b - 1]) + 1)[wanted[a:b] - low]
    return out
