"""Checks a folder that quantkit wrote against the manifest in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from quantkit.checkpoint.files import PositionedFile
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.errors import CheckpointError
from quantkit.quantizer.manifest import CHUNK, Manifest, Verification, hash_range, manifest_path


def verify_folder(folder: Path) -> Verification:
    """Check every file, and every tensor, so that a difference has a name.

    Raises CheckpointError if there is no manifest, or it is damaged.
    """
    sidecar = manifest_path(folder)
    if not sidecar.exists():
        raise CheckpointError(f"{folder} has no {sidecar.name}", hint="quantkit did not write this folder, or the file was lost")
    manifest = Manifest.read(sidecar)
    out = Verification(str(folder), [], [], [])
    for name, entry in manifest.files.items():
        if not (folder / name).is_file():
            out.wrong.append(f"{name} is missing")
        elif _hash_file(folder / name) != entry["sha256"]:
            out.wrong.append(f"{name} differs from the manifest")
            _name_tensors(folder / name, manifest, out)
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in {sidecar.name, *manifest.files})
    if foreign:
        out.unchecked.append(f"files that are not in the manifest: {', '.join(foreign)}")
    out.checked.append(f"{len(manifest.files)} files, with {len(manifest.tensors)} weights, against {sidecar.name}")
    return out


def _hash_file(path: Path) -> str:
    file, digest = PositionedFile(path), hashlib.sha256()
    try:
        for start in range(0, file.size, CHUNK):
            digest.update(file.read(start, min(CHUNK, file.size - start)))
    finally:
        file.close()
    return digest.hexdigest()


def _name_tensors(path: Path, manifest: Manifest, out: Verification) -> None:
    """Which weights of a safetensors file differ."""
    if path.suffix != ".safetensors":
        return
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        out.wrong.append(error.what)
        return
    label, suffixes = manifest.plan["label"], manifest.plan["suffixes"]
    for name, entry in manifest.tensors.items():
        module = name.rpartition(".")[0]
        stored = [f"{module}.{suffix}" for suffix in suffixes] if entry["format"] == label else [name]
        if not any(part in file.entries for part in stored):
            continue  # in another file
        digest = hashlib.sha256()
        missing = [part for part in stored if part not in file.entries]
        for part in stored:
            if part in file.entries:
                hash_range(file, file.entries[part].start, file.entries[part].nbytes, digest)
        if missing or digest.hexdigest() != entry["sha256"]:
            out.wrong.append(f"weight {name} differs from the manifest")
