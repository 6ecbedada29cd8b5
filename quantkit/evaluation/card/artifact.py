"""A quantized file or folder as a model card tells of it: read from its manifest, its metadata and its plan."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint, HfCheckpoint, open_checkpoint, require_readable
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.documents import typed
from quantkit.checkpoint.files import read_json
from quantkit.checkpoint.gguf_checkpoint import split_files
from quantkit.checkpoint.gguf_reader import GgufFile, type_name
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.planning.artifact import FILE_TYPES, PLAN_NAME
from quantkit.quantizer.hashes import joint_sha256, manifests_of
from quantkit.quantizer.manifest import Manifest, manifest_path
from quantkit.quantizer.measured import Measured

MIXES = {number: name for name, number in reversed(FILE_TYPES.items())}  # by general.file_type


@dataclass(frozen=True)
class StoredFile:
    """One file with weights; sha256 by its manifest."""

    name: str
    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class StoredTensor:
    """One tensor under its GGUF name; nbytes is None for a type that quantkit has no format for."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Share:
    """All tensors of one format; weights and nbytes as shares of all."""

    format: str
    tensors: int
    weights: float
    nbytes: float | None
    bpw: float | None


@dataclass(frozen=True)
class Artifact:
    """A quantized file, all parts of a split one, or a folder. metadata: of the GGUF, or config.json's.

    checkpoint: None where quantkit does not know the architecture or a type.
    """

    path: Path
    container: str
    architecture: str
    files: tuple[StoredFile, ...]
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, Any]
    manifests: tuple[Manifest, ...]
    checkpoint: Checkpoint | None

    @property
    def file_name(self) -> str:
        """Of the file (the first part of a split one), or of the folder; links are not followed."""
        return os.path.basename(os.path.abspath(self.path))

    @property
    def name(self) -> str:
        """The same without the number of a part and the end of a GGUF."""
        return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", self.file_name)

    @property
    def folder(self) -> Path:
        """Where the file or folder lies."""
        return Path(os.path.abspath(self.path)).parent

    @property
    def base_architecture(self) -> str:
        """llama.cpp's name of the architecture where quantkit knows it, else as the artifact says."""
        return self.architecture if self.checkpoint is None else self.checkpoint.family.arch

    @property
    def mix(self) -> str:
        """The plan's name without its kind, else what the GGUF's file type says, else the format of most weights."""
        said = self.manifests[0].plan["name"] if self.manifests else self.metadata.get(PLAN_NAME)
        if isinstance(said, str) and said:
            return re.sub("^(standard|uniform)-", "", said)
        number = self.metadata.get("general.file_type")
        return MIXES.get(number, "") if isinstance(number, int) and number in MIXES else self.shares()[0].format

    @property
    def model(self) -> str:
        """What was quantized, as far as it is known."""
        said = self.manifests[0].source.get("name") if self.manifests else self.metadata.get("general.name")
        return said if isinstance(said, str) and said else "A model"

    @property
    def weights(self) -> int:
        """Weights over all tensors."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bpw(self) -> float | None:
        """8 × bytes of tensor data ÷ weights; None if a type is unknown."""
        return _bpw(self.tensors)

    @property
    def file_bytes(self) -> int:
        """Of the files with weights."""
        return sum(file.nbytes for file in self.files)

    @property
    def sha256(self) -> str | None:
        """As in a board's rows."""
        return joint_sha256(self.manifests)

    def shares(self) -> list[Share]:
        """Formats, the one with the most weights first."""
        groups: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.format, []).append(tensor)
        total, out = sum(tensor.nbytes or 0 for tensor in self.tensors), []
        for name, some in groups.items():
            bpw, weights = _bpw(some), sum(tensor.weights for tensor in some)
            known = None if bpw is None or self.bpw is None else bpw * weights / 8 / total
            out.append(Share(name, len(some), weights / self.weights, known, bpw))
        return sorted(out, key=lambda share: -share.weights)


def _bpw(tensors: Sequence[StoredTensor]) -> float | None:
    sizes = [tensor.nbytes for tensor in tensors if tensor.nbytes is not None]
    return 8 * sum(sizes) / sum(tensor.weights for tensor in tensors) if len(sizes) == len(tensors) else None


def read_artifact(path: Path) -> Artifact:
    """Raises CheckpointError if ``path`` is no model, is a folder that is not quantized, or has a manifest of another file."""
    if path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", hint="give a quantized GGUF file or safetensors folder")
    files = [GgufFile(part) for part in split_files(path)]
    values = gv.plain(files[0].metadata)
    if values.get("general.type", "model") != "model" or not isinstance(values.get("general.architecture"), str):
        raise CheckpointError(f"{path.name} is a GGUF, but not of a model", hint="give the model's own file")
    if not any(file.entries for file in files):
        raise CheckpointError(f"{path.name} has no tensors", hint="give the model's own file")
    manifests = _manifests([file.path for file in files])
    sums: list[str | None] = [*(manifest.file_sha256 for manifest in manifests)] or [None for _ in files]
    tensors = (
        StoredTensor(name, entry.format.name if entry.format else type_name(entry.gguf_id), entry.shape, entry.nbytes if entry.format else None)
        for file in files for name, entry in file.entries.items()
    )  # fmt: skip
    checkpoint = None
    with contextlib.suppress(QuantkitError):  # a card tells of architectures that quantkit does not run, too
        checkpoint = open_checkpoint(path)
        require_readable(checkpoint)
    return Artifact(
        files[0].path, "GGUF", values["general.architecture"],
        tuple(StoredFile(file.path.name, file.file.size, digest) for file, digest in zip(files, sums, strict=True)),
        tuple(tensors), values, tuple(manifests), checkpoint,
    )  # fmt: skip


def _manifests(paths: Sequence[Path]) -> list[Manifest]:
    """Those that belong to the files and say what a card tells. Raises CheckpointError for others."""
    found = manifests_of(paths)
    for path, manifest in zip(paths, found, strict=bool(found)):
        try:
            typed(
                tuple[str, ...],
                [manifest.plan["name"], *(manifest.source[key] for key in ("name", "identity", "architecture"))],
                "",
            )
            Measured(**(manifest.plan.get("measured_kld") or {"kld": 0.0, "error": 0.0, "tokens": 0}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{manifest_path(path)} is damaged ({error})", hint="delete it to describe the file by itself") from None  # fmt: skip
    return found


def _read_folder(path: Path) -> Artifact:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, HfCheckpoint)
    require_readable(checkpoint)
    if not checkpoint.quantization:
        raise CheckpointError(f"{path} is not quantized", hint="give a folder with a quantization_config, or a GGUF file")
    manifests = _manifests([path])
    sums = {name: entry["sha256"] for manifest in manifests for name, entry in manifest.files.items()}
    tensors = tuple(StoredTensor(t.name, t.dtype, t.shape, checkpoint.nbytes(t.name)) for t in checkpoint.tensors.values())
    files = tuple(StoredFile(f.name, f.stat().st_size, sums.get(f.name)) for f in checkpoint.weight_files)
    config = read_json(path / "config.json")
    return Artifact(
        path, "safetensors", str(config.get("model_type")), files, tensors, config, tuple(manifests), checkpoint
    )  # fmt: skip
