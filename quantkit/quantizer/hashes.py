"""Which file it is: the SHA-256 of an artifact by its manifests, if they belong to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.adapter import AdaptedCheckpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.errors import CheckpointError
from quantkit.quantizer.manifest import Manifest, hash_range, manifest_path


def known_sha256(checkpoint: Checkpoint) -> str | None:
    """SHA-256 of a candidate by its manifest; None if it has none that belongs to it."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return None
    folder = checkpoint.path if checkpoint.path.is_dir() else None
    try:
        return joint_sha256(manifests_of([folder] if folder else checkpoint.weight_files))
    except CheckpointError:
        return None


def joint_sha256(manifests: Sequence[Manifest]) -> str | None:
    """SHA-256 of the one file; of several that of the lines ``SHA256  NAME``; None of none."""
    if len(manifests) < 2:
        return manifests[0].file_sha256 if manifests else None
    return hashlib.sha256("".join(f"{m.file_sha256}  {m.file}\n" for m in manifests).encode()).hexdigest()


def manifests_of(paths: Sequence[Path]) -> list[Manifest]:
    """Manifests of all parts of a GGUF, or of one folder; empty if one is missing.

    Raises CheckpointError if a manifest is damaged, or was written for another file: sizes and the header, which holds
    hashes of the tensors, are checked, the data are not.
    """
    if not all(manifest_path(path).exists() for path in paths):
        return []
    found = [Manifest.read(manifest_path(path)) for path in paths]
    for path, manifest in zip(paths, found, strict=True):
        if path.is_dir():
            there = {name: path / name for name in manifest.files}
            same = bool(there) and all(p.is_file() and p.stat().st_size == manifest.files[n]["bytes"] for n, p in there.items())
            same = same and hashlib.sha256((path / "config.json").read_bytes()).hexdigest() == manifest.header_sha256
        else:
            file = GgufFile(path)
            same = file.file.size == manifest.file_bytes and hash_range(file, 0, file.data_start) == manifest.header_sha256
        if not same:
            raise CheckpointError(
                f"{manifest_path(path)} does not belong to {path.name}",
                hint="delete it if the file was replaced, or see `quantkit verify`",
            )
    return found
