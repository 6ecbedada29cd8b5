"""The files of one repository: quantized models of the same base, and what goes with them."""

from __future__ import annotations

import os
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from quantkit.analysis.imatrix import read_imatrix
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.adapter import read_adapter
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.errors import OutputError, PlanError
from quantkit.evaluation.card.artifact import Artifact, read_artifact
from quantkit.quantizer.manifest import hash_range

SAME = "a card is about one base: write one for each"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Companion:
    """A file that is used beside the models. kind: ``imatrix`` or ``adapter``; what: in words.

    shapes: the ends of the shapes that tensors of the models must have, by their names.
    """

    path: Path
    kind: str
    what: str
    nbytes: int
    sha256: str
    shapes: dict[str, Shape]
    architecture: str | None

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return Path(os.path.abspath(self.path)).parent


@dataclass(frozen=True)
class Collection:
    """Models, the largest first, at least one; and companions by name."""

    artifacts: tuple[Artifact, ...]
    companions: tuple[Companion, ...] = ()

    @property
    def members(self) -> list[Artifact | Companion]:
        """All of them."""
        return [*self.artifacts, *self.companions]


def read_collection(paths: Sequence[Path]) -> Collection:
    """Quantized files and folders, imatrix files and adapters; parts of a split file count as one model.

    Raises a QuantkitError for what is none of these, PlanError if no model is among them, or for two of another base.
    """
    artifacts: dict[Path, Artifact] = {}
    companions: dict[Path, Companion] = {}
    for path in paths:
        if (found := read_companion(path)) is not None:
            companions[path.resolve()] = found
        else:
            artifact = read_artifact(path)
            artifacts[artifact.path.resolve()] = artifact
    if not artifacts:
        raise PlanError("no quantized model is among the files", hint="give the models, too")
    first, *others = artifacts.values()
    for other in others:
        if (why := another_base(first, other)) is not None:
            raise PlanError(f"{other.file_name} is of another base than {first.file_name}: {why}", hint=SAME)
    for companion in companions.values():
        _require_fit(companion, first)
    ranked = sorted(artifacts.values(), key=lambda artifact: (-artifact.file_bytes, artifact.file_name))
    return Collection(tuple(ranked), tuple(sorted(companions.values(), key=lambda companion: companion.path.name)))


def read_companion(path: Path) -> Companion | None:
    """None for anything but a GGUF that calls itself an imatrix or an adapter. Raises a QuantkitError if it is damaged."""
    if path.suffix != ".gguf" or not path.is_file():
        return None
    file = GgufFile(path)
    kind = gv.plain(file.metadata).get("general.type")
    if kind == "imatrix":
        stats = read_imatrix(path)
        texts = f" from {', '.join(stats.datasets)}" if stats.datasets else ""
        what = f"activation statistics (imatrix) of {_count(stats.tensors)}{texts}"
        shapes: dict[str, Shape] = {name: (entry.sum_squares.shape[-1],) for name, entry in stats.tensors.items()}
        architecture = None
    elif kind == "adapter":
        adapter = read_adapter(path)
        ranks = sorted({a.shape[-2] for a, _ in adapter.pairs.values()})
        what = f"LoRA adapter of rank {', '.join(map(str, ranks))} for {_count(adapter.pairs)}"
        shapes = {name: (*b.shape[:-1], a.shape[-1]) for name, (a, b) in adapter.pairs.items()}
        architecture = adapter.architecture
    else:
        return None
    return Companion(path, kind, what, file.file.size, hash_range(file, 0, file.file.size), shapes, architecture)


def _count(tensors: Sized) -> str:
    return f"{len(tensors)} tensor{'s' if len(tensors) != 1 else ''}"


def another_base(first: Artifact, second: Artifact) -> str | None:
    """Why two artifacts cannot be of the same original, None if nothing speaks against it.

    Architecture, shapes, and the originals that the manifests name. Rescaled weights have an identity of their own
    (docs/files.md); manifests that do not say of which original are believed if its name is the same.
    """
    if first.base_architecture != second.base_architecture:
        return f"architecture {second.base_architecture}, not {first.base_architecture}"
    shapes = {tensor.name: tensor.shape for tensor in first.tensors}
    for tensor in second.tensors:
        if (shape := shapes.get(tensor.name, tensor.shape)) != tensor.shape:
            return f"{tensor.name} is {list(tensor.shape)}, not {list(shape)}"
    if not (first.manifests and second.manifests):
        return None
    one, other = first.manifests[0], second.manifests[0]
    if one.source["identity"] == other.source["identity"]:
        return None
    if "original" in one.source and "original" in other.source:
        same = one.source["original"] == other.source["original"]
    else:  # of an older quantkit
        rescaled = any(str(manifest.plan["name"]).startswith("dynamic") for manifest in (one, other))
        same = rescaled and one.source["name"] == other.source["name"]
    if same:
        return None
    return "made from {name} ({identity}), not ".format(**other.source) + "{name} ({identity})".format(**one.source)


def _require_fit(companion: Companion, artifact: Artifact) -> None:
    """Raise PlanError if the file is for another model."""
    if companion.architecture not in (None, artifact.base_architecture):
        why = f"architecture {companion.architecture}, not {artifact.base_architecture}"
        raise PlanError(f"{companion.path.name} is not for {artifact.file_name}: {why}", hint=SAME)
    shapes = {tensor.name: tensor.shape for tensor in artifact.tensors}
    for name, shape in companion.shapes.items():
        if name not in shapes or shapes[name][-len(shape) :] != shape:
            there = list(shapes[name]) if name in shapes else "missing"
            why = f"{name} is {there}, it wants {list(shape)}"
            raise PlanError(f"{companion.path.name} is not for {artifact.file_name}: {why}", hint=SAME)


def default_target(collection: Collection) -> Path:
    """README.md in the one folder, or beside the files. Raises OutputError if they are in several folders."""
    members = collection.members
    if len(members) == 1 and members[0].path.is_dir():
        return members[0].path / "README.md"
    folders = {member.folder.resolve(): member.folder for member in members}
    if len(folders) > 1:
        where = ", ".join(str(folder) for folder in folders.values())
        raise OutputError(f"the files are in several folders: {where}", hint="say where the card goes with -o")
    return next(iter(folders.values())) / "README.md"


@dataclass(frozen=True)
class Place:
    """Where a file will be in the repository. name: as it is shown and run from there; file: what a link opens."""

    name: str
    file: str


def places(collection: Collection, folder: Path) -> dict[Path, Place]:
    """By path of the members: their way from ``folder``, in which the card lies, or their names alone if they lie elsewhere.

    Raises PlanError if two would be in the same place.
    """
    root = Path(os.path.abspath(folder)).resolve()
    out: dict[Path, Place] = {}
    for member in collection.members:
        real = member.folder.resolve() / os.path.basename(os.path.abspath(member.path))
        inside = real != root and real.is_relative_to(root)
        name = real.relative_to(root).as_posix() if inside else real.name
        if (other := next((path for path, place in out.items() if place.name == name), None)) is not None:
            raise PlanError(f"{other} and {member.path} would both be {name} in one repository", hint="rename one of them")
        file = name
        if isinstance(member, Artifact) and member.path.is_dir():
            file = member.files[0].name if real == root else f"{name}/{member.files[0].name}"
        out[member.path] = Place(name, file)
    return out
