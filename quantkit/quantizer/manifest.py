"""The manifest beside a file: what was written, from what, by what, with hashes that verify reads.

GGUF has no checksum of its own. The sidecar ``<file>.manifest.json`` holds SHA-256 of every tensor, of
the header and of the whole file; the GGUF's metadata carry 128 bits of each tensor's hash, so that the
data can be checked without the sidecar. The manifest of a safetensors folder lies in it (verify_folder.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.errors import CheckpointError
from quantkit.planning.artifact import HASH_BYTES, HASHES

VERSION = 1
CHUNK = 1 << 22
FOLDER_MANIFEST = "quantkit.manifest.json"


@dataclass
class Manifest:
    """What one finished file consists of."""

    file: str
    file_bytes: int
    file_sha256: str
    header_sha256: str
    bpw: float
    source: dict[str, Any]
    plan: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    importance: str | None = None  # texts behind the activation statistics, None: errors were not weighted
    parts: list[str] = field(default_factory=list)  # names of all parts of a split file
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a folder: name → bytes and SHA-256
    notes: list[str] = field(default_factory=list)  # what the user should know

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps({"quantkit_manifest": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a manifest. Raises CheckpointError if it is damaged."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("quantkit_manifest") != VERSION:
                raise ValueError("another version")
            found = Manifest(**data)
            if not all(isinstance(entry["sha256"], str) for entry in found.tensors.values()):
                raise ValueError("a tensor without its hash")
            return found
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{path} is not a manifest ({error})", hint="delete it to check the file by itself") from None


def manifest_path(path: Path) -> Path:
    """Where the manifest of a file or of a folder lies."""
    if path.is_dir():
        return path / FOLDER_MANIFEST
    return path.with_name(path.name + ".manifest.json")


def source_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What a manifest says of the model: ``original`` is the identity on disk where ``identity`` is that of rescaled weights."""
    return {
        "name": checkpoint.path.resolve().name, "architecture": checkpoint.family.arch, "identity": checkpoint.identity,
        "original": checkpoint.original,
    }  # fmt: skip


@dataclass
class Verification:
    """The outcome of verify: what was checked, what was wrong, what could not be checked."""

    file: str
    checked: list[str]
    wrong: list[str]
    unchecked: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong and something was checked."""
        return not self.wrong and bool(self.checked)


def hash_range(file: GgufFile | SafetensorsFile, start: int, length: int, digest: Any = None) -> str:
    """SHA-256 of a byte range, hexadecimal; of what ``digest`` has seen before, too."""
    digest = digest or hashlib.sha256()
    while length > 0:
        part = file.file.read(start, min(CHUNK, length))
        digest.update(part)
        start, length = start + len(part), length - len(part)
    return digest.hexdigest()


def verify(path: Path) -> Verification:
    """Check a file against its manifest, and against the hashes in its own metadata; or a folder against its manifest.

    Raises CheckpointError if the file itself cannot be parsed.
    """
    if path.is_dir():
        from quantkit.quantizer.verify_folder import verify_folder

        return verify_folder(path)
    file = GgufFile(path)
    out = Verification(str(path), [], [], [])
    actual = {name: hash_range(file, entry.start, entry.nbytes) for name, entry in file.entries.items()}
    _check_embedded(file, actual, out)
    sidecar = manifest_path(path)
    if not sidecar.exists():
        out.unchecked.append(f"header and whole file: {sidecar.name} is missing")
        return out
    manifest = Manifest.read(sidecar)
    for name, digest in actual.items():
        entry = manifest.tensors.get(name)
        if entry is None or entry["sha256"] != digest:
            out.wrong.append(f"tensor {name} differs from the manifest" if entry else f"tensor {name} is not in the manifest")
    out.wrong += [f"tensor {name} is missing from the file" for name in manifest.tensors if name not in actual]
    header = hash_range(file, 0, file.data_start)
    if header != manifest.header_sha256:
        out.wrong.append("the header (metadata or tensor table) differs from the manifest")
    if hash_range(file, 0, file.file.size) != manifest.file_sha256:
        out.wrong.append(f"the whole file differs from the manifest ({file.file.size:,} bytes, {manifest.file_bytes:,} expected)")
    out.checked.append(f"header, {len(actual)} tensors and the whole file against {sidecar.name}")
    return out


def _check_embedded(file: GgufFile, actual: dict[str, str], out: Verification) -> None:
    value = file.metadata.get(HASHES)
    if value is None or value.item_type != gv.U8 or len(value.value) != HASH_BYTES * len(actual):
        out.unchecked.append("tensors by the file's own hashes: it carries none (not written by quantkit?)")
        return
    raw = bytes(value.value)
    for i, (name, digest) in enumerate(actual.items()):
        if raw[HASH_BYTES * i : HASH_BYTES * (i + 1)] != bytes.fromhex(digest)[:HASH_BYTES]:
            out.wrong.append(f"tensor {name} differs from the hash in the file's metadata")
    out.checked.append(f"{len(actual)} tensors against the hashes in the file's metadata")
