"""Low-rank adapters as llama.cpp reads them, and a model with one added.

Specification: ``llama_adapter_lora_init_impl`` in llama.cpp, src/llama-adapter.cpp: ``general.type`` adapter,
``adapter.type`` lora, for each tensor NAME two of them, NAME.lora_a (rank, columns) and NAME.lora_b (rows, rank). Their
product is added with the factor alpha ÷ rank, or 1 where alpha is 0. Of stacked experts both have the experts in front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.gguf_writer import TensorSpec, file_bytes, write_gguf
from quantkit.checkpoint.source import Checkpoint, CheckpointView
from quantkit.errors import CheckpointError
from quantkit.formats import get_format
from quantkit.versions import DISTRIBUTION, package_versions

A, B = ".lora_a", ".lora_b"
Matrix = npt.NDArray[np.float32]
Pair = tuple[Matrix, Matrix]  # (rank, columns), (rows, rank); of experts (experts, rank, columns), (experts, rows, rank)
Shape = tuple[int, ...]  # rows, rank, columns; of experts with their number in front


def adapter_metadata(architecture: str, alpha: float = 0.0) -> gv.Metadata:
    """Metadata of an adapter; with alpha 0 its pairs are added as they are."""
    return {
        "general.type": gv.string("adapter"), "general.architecture": gv.string(architecture), "adapter.type": gv.string("lora"),
        "adapter.lora.alpha": gv.f32(alpha), "quantkit.version": gv.string(package_versions().get(DISTRIBUTION, "0")),
    }  # fmt: skip


def adapter_specs(shapes: Mapping[str, Shape], dtype: str = "F16") -> list[TensorSpec]:
    """Tensors of the file. shapes: by tensor name."""
    fmt = get_format(dtype)
    out = []
    for name, (*experts, rows, rank, columns) in shapes.items():
        out += [TensorSpec(name + A, (*experts, rank, columns), fmt), TensorSpec(name + B, (*experts, rows, rank), fmt)]
    return out


def adapter_bytes(architecture: str, shapes: Mapping[str, Shape]) -> int:
    """Exact size of the file in F16."""
    return file_bytes(adapter_metadata(architecture), adapter_specs(shapes))


def write_adapter(path: Path, architecture: str, pairs: dict[str, Pair], alpha: float = 0.0, dtype: str = "F16") -> None:
    """Write pairs by tensor name as an adapter in F16 or F32; it appears under its name when it is complete."""
    shapes = {name: (*b.shape, a.shape[-1]) for name, (a, b) in pairs.items()}
    stored = {"F16": "<f2", "F32": "<f4"}[dtype]
    with write_gguf(path, adapter_metadata(architecture, alpha), adapter_specs(shapes, dtype)) as writer:
        for name, (a, b) in pairs.items():
            for end, part in ((A, a), (B, b)):
                writer.write(name + end, np.ascontiguousarray(part.reshape(-1, part.shape[-1]), stored).view(np.uint8))


@dataclass(frozen=True)
class Adapter:
    """pairs: (rank, columns) and (rows, rank) by tensor name, the factor already in the second."""

    path: Path
    architecture: str
    pairs: dict[str, Pair]


def read_adapter(path: Path) -> Adapter:
    """Raises CheckpointError if the file is no adapter of this kind or a half of a pair is missing."""
    file = GgufFile(path)
    values = gv.plain(file.metadata)
    if values.get("general.type") != "adapter" or values.get("adapter.type") != "lora":
        raise CheckpointError(f"{path.name} is no LoRA adapter", hint="give FILE+ADAPTER, the model's file first")
    alpha = float(values.get("adapter.lora.alpha", 0.0))
    pairs: dict[str, Pair] = {}
    for name, entry in file.entries.items():
        stem, other = name.removesuffix(A), name.removesuffix(A) + B
        if name.endswith(B) and name.removesuffix(B) + A in file.entries:
            continue
        if not name.endswith(A) or other not in file.entries or len(entry.shape) not in (2, 3):
            raise CheckpointError(f"{path.name}: {name} belongs to no pair", hint="only pairs of matrices can be added")
        shapes = [file.entries[half].shape for half in (name, other)]
        a, b = (file.read_rows(half, 0, math.prod(s[:-1])).reshape(s) for half, s in zip((name, other), shapes, strict=True))
        if b.shape[-1] != a.shape[-2] or b.shape[:-2] != a.shape[:-2]:
            raise CheckpointError(f"{path.name}: {name} and {other} do not fit together", hint="make the adapter again")
        pairs[stem] = (a, b * np.float32(alpha / a.shape[-2] if alpha else 1.0))
    return Adapter(path, str(values.get("general.architecture")), pairs)


class AdaptedCheckpoint(CheckpointView):
    """A view of ``source`` with the products of an adapter added."""

    def __init__(self, source: Checkpoint, adapter: Adapter) -> None:
        """Raises CheckpointError if the adapter is for another model."""
        for name, (a, b) in adapter.pairs.items():
            shape = source.tensors[name].shape if name in source.tensors else None
            wanted = (*b.shape[:-1], a.shape[-1])
            if shape != wanted or adapter.architecture != source.family.arch:
                raise CheckpointError(
                    f"{adapter.path.name} does not fit {source.path.name}: {name} is {shape or 'missing'}, the adapter wants {wanted}",
                    hint="an adapter belongs to the file for which it was made",
                )
        super().__init__(source)
        self.adapter = adapter

    @property
    def weight_files(self) -> list[Path]:
        return [*self.source.weight_files, self.adapter.path]

    def nbytes(self, name: str) -> int:
        pair = self.adapter.pairs.get(name)
        return self.source.nbytes(name) + (0 if pair is None else 2 * (pair[0].size + pair[1].size))

    def read_rows(self, name: str, start: int, stop: int) -> Matrix:
        rows = self.source.read_rows(name, start, stop)
        if name not in self.adapter.pairs:
            return rows
        a, b = self.adapter.pairs[name]
        if a.ndim == 2:
            return rows + b[start:stop] @ a
        each = b.shape[1]
        for expert in range(start // each, -(-stop // each)):
            first, last = max(start, expert * each), min(stop, (expert + 1) * each)
            rows[first - start : last - start] += b[expert, first - expert * each : last - expert * each] @ a[expert]
        return rows
