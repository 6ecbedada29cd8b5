"""A model on disk whose tensors are read piece by piece, under their GGUF names.

Two kinds, one interface: a Hugging Face folder (huggingface.py) and a GGUF file (gguf_checkpoint.py). Row
order and stacking are llama.cpp's in both, so everything downstream sees one layout.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.families import Family
from quantkit.checkpoint.roles import Role, is_quantizable, layer_of, role_of
from quantkit.checkpoint.shapes import check_shapes
from quantkit.errors import CheckpointError

SAMPLED_ROWS = 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor under its GGUF name; shape as NumPy orders it, experts stacked in front."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def role(self) -> Role:
        """What the tensor does."""
        return role_of(self.name)

    @property
    def layer(self) -> int | None:
        """Its layer, None outside the layers."""
        return layer_of(self.name)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows over all experts."""
        return self.size // self.columns

    @property
    def experts(self) -> int:
        """Stacked experts, 1 for an ordinary matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def quantizable(self) -> bool:
        """Whether llama.cpp would quantize it."""
        return is_quantizable(self.name, self.shape)


class Checkpoint:
    """Base of both kinds; ``tensors`` is in file order."""

    path: Path
    family: Family
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    plain_types: ClassVar[tuple[str, ...]] = ("F32", "F16", "BF16")

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start…stop of a tensor (rows of all experts in sequence) as float32 (rows, columns)."""
        raise NotImplementedError

    def metadata(self) -> gv.Metadata:
        """GGUF metadata of the unquantized model, tokenizer included."""
        raise NotImplementedError

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file; 0 if its type is unknown."""
        raise NotImplementedError

    def require_unquantized(self) -> None:
        """Raise CheckpointError if a tensor is quantized already: quantizing twice loses twice."""
        for info in self.tensors.values():
            if info.dtype not in self.plain_types:
                raise CheckpointError(
                    f"{self.path.resolve().name} is quantized already ({info.name} is {info.dtype})",
                    hint="start from the BF16, F16 or F32 model",
                )

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor as float32 in its own shape."""
        info = self.info(name)
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def info(self, name: str) -> TensorInfo:
        """Facts about one tensor. Raises CheckpointError with near names if it is missing."""
        if name not in self.tensors:
            import difflib

            near = ", ".join(difflib.get_close_matches(name, self.tensors, n=3)) or "none alike"
            raise CheckpointError(f"{self.path.name} has no tensor {name!r}", hint=f"nearest names: {near}")
        return self.tensors[name]

    @property
    def opened(self) -> Checkpoint:
        """The checkpoint on disk: itself, or what a view looks at."""
        return self

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weights."""
        return "output.weight" not in self.tensors

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def n_weights(self) -> int:
        """Weights over all tensors."""
        return sum(t.size for t in self.tensors.values())

    @cached_property
    def identity(self) -> str:
        """A hash that tells models apart: architecture, shapes and a sample of every tensor's rows."""
        digest = hashlib.sha256(self.family.arch.encode())
        for key, value in sorted(self.family.metadata(self.config).items()):
            digest.update(key.encode() + value.packed())
        for info in sorted(self.tensors.values(), key=lambda t: t.name):
            digest.update(f"{info.name}{info.shape}".encode())
            for row in np.unique(np.linspace(0, info.rows - 1, SAMPLED_ROWS).astype(int)):
                digest.update(self.read_rows(info.name, int(row), int(row) + 1).tobytes())
        return digest.hexdigest()[:16]

    @property
    def original(self) -> str:
        """Identity of the model on disk, also of a view whose weights are others."""
        return self.identity

    @property
    def stamp(self) -> str:
        """Sizes and times of the files: changes whenever a weight is edited. Guards everything cached."""
        stats = [path.stat() for path in self.weight_files]
        return hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in stats]).encode()).hexdigest()[:16]

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        raise NotImplementedError

    def _check(self) -> None:
        """Refuse what contradicts the config, before anything is read."""
        shapes = {info.name: info.shape for info in self.tensors.values()}
        check_shapes(shapes, self.config, self.family, self.path.resolve().name)


class CheckpointView(Checkpoint):
    """Another checkpoint's names, shapes and metadata; a subclass gives other weights. Nothing is kept in memory."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.path, self.family, self.config, self.tensors = source.path, source.family, source.config, source.tensors
        self.plain_types = source.plain_types  # type: ignore[misc]

    @property
    def opened(self) -> Checkpoint:
        return self.source.opened

    @property
    def weight_files(self) -> list[Path]:
        return self.source.weight_files

    def metadata(self) -> gv.Metadata:
        return self.source.metadata()

    def nbytes(self, name: str) -> int:
        return self.source.nbytes(name)
