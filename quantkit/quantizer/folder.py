"""Writes a Hugging Face folder whose linear layers are quantized: safetensors, config.json, tokenizer, manifest.

Weights are read, rounded and written one after another. A few are under way at once if they are small, so that
all cores have work; memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.checkpoint import Checkpoint, HfCheckpoint
from quantkit.checkpoint.files import atomic_folder, read_json, require_folder, write_text
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.checkpoint.safetensors_writer import (
    INDEX,
    SafetensorsWriter,
    StoredTensor,
    index_json,
    into_shards,
    shard_names,
)
from quantkit.encoders.base import check_finite
from quantkit.errors import FormatError, OutputError, PlanError
from quantkit.formats.tensors import TensorFormat
from quantkit.progress import Progress
from quantkit.quantizer.folder_config import quantization_config
from quantkit.quantizer.folder_plan import FolderPlan, plan_folder, require_source
from quantkit.quantizer.manifest import Manifest, manifest_path, source_of
from quantkit.quantizer.stream import in_order
from quantkit.threads import default_threads
from quantkit.versions import package_versions

SHARD_BYTES = 4 << 30
IN_FLIGHT_BYTES = 1 << 31  # memory of the weights under way, unless a single one needs more
BYTES_PER_WEIGHT = 20  # of one weight under way: stored bits, float32, the codec's temporaries, packed codes
COPY_BYTES = 1 << 24  # of a tensor that stays as it is, at a time
# Besides the weights: what tokenizers and generation need, and the licence.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip

Piece = tuple[str, int, np.ndarray]  # stored tensor, byte offset, bits
Pieces = Callable[[], list[Piece]]


@dataclass(frozen=True)
class _Weight:
    """One tensor of the source, and what is stored for it."""

    name: str
    source: SafetensorsFile
    format: type[TensorFormat] | None
    stored: list[StoredTensor]

    @property
    def weights(self) -> int:
        """How many numbers the source has."""
        return math.prod(self.source.entries[self.name].shape)

    def pieces(self) -> Iterator[Pieces]:
        """Calls that read and encode it, in order."""
        if self.format is not None:
            yield self._encode
            return
        shape = self.source.entries[self.name].shape or (1,)
        rows = math.prod(shape[:-1])
        step = max(1, COPY_BYTES * rows // max(1, self.stored[0].nbytes))
        for start in range(0, rows, step):
            yield lambda a=start: self._copy(a, min(a + step, rows))  # type: ignore[misc]

    def _encode(self) -> list[Piece]:
        assert self.format is not None
        shape = self.source.entries[self.name].shape
        try:
            tensors = self.format.encode(self.source.read_rows(self.name, 0, shape[0]))
        except FormatError as error:
            raise FormatError(f"{self.name}: {error.what}", hint=error.hint) from None
        module = self.name.rpartition(".")[0]
        return [(f"{module}.{suffix}", 0, tensor) for suffix, tensor in tensors.items()]

    def _copy(self, start: int, stop: int) -> list[Piece]:
        """Rows as they are. Raises FormatError if a number is not finite."""
        check_finite(self.source.read_rows(self.name, start, stop), self.name, (start,))
        entry = self.source.entries[self.name]
        row = entry.nbytes // math.prod(entry.shape[:-1])
        data = self.source.file.read(entry.start + start * row, (stop - start) * row)
        return [(self.name, start * row, np.frombuffer(data, np.uint8))]


def run(
    checkpoint: Checkpoint, fmt: type[TensorFormat], out: Path, *, force: bool = False, threads: int | None = None,
    shard_bytes: int | None = None, progress: Progress | None = None,
) -> Manifest:  # fmt: skip
    """Write ``checkpoint`` in a multi-tensor format as the folder ``out``; returns its manifest.

    shard_bytes: size of one safetensors file at most, 4 GiB unless told. Raises CheckpointError for a GGUF or a
    model that is quantized already, PlanError if no layer fits the format, FormatError for weights that cannot be
    rounded, OutputError if the output exists or cannot be written; nothing is left under its name then.
    """
    started = time.perf_counter()
    source = require_source(checkpoint, fmt)
    check_output(source, out, force)
    plan = plan_folder(source, fmt)
    weights = list(_weights(source, plan))
    shards = _shards(weights, shard_bytes)
    texts = {"config.json": _config(source, plan)}
    if len(shards) > 1:
        texts[INDEX] = index_json({file: [t for w in part for t in w.stored] for file, part in shards.items()})
    total = sum(tensor.room for weight in weights for tensor in weight.stored)
    task = (progress or Progress()).task("quantize", total=sum(t.nbytes for w in weights for t in w.stored), unit="bytes")
    hashes: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = {}
    with atomic_folder(out, total, replace=force) as folder:
        for file, part in shards.items():
            with SafetensorsWriter(folder / file, [tensor for weight in part for tensor in weight.stored]) as writer:
                hashes |= _write(part, writer, threads or default_threads(), task.advance)
                files[file] = {"bytes": writer.size, "sha256": writer.sync()}
        for name in COMPANIONS:
            if (source.path / name).is_file():
                files[name] = _write_file(folder / name, (source.path / name).read_bytes())
        for name, text in texts.items():
            files[name] = _write_file(folder / name, text.encode())
        manifest = _manifest(source, plan, weights, hashes, files, out)
        manifest.seconds = round(time.perf_counter() - started, 3)
        write_text(manifest_path(folder), manifest.to_json())
    task.done()
    return manifest


def check_output(checkpoint: HfCheckpoint, out: Path, force: bool) -> None:
    """Raise OutputError if ``out`` belongs to the model, or exists and must not be replaced.

    Only folders that quantkit wrote, or empty ones, are replaced.
    """
    source, target = checkpoint.path.resolve(), out.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise OutputError(f"{out} is the model's own folder, or one holds the other", hint="choose another output with -o")
    if out.suffix == ".gguf":
        raise OutputError(f"{out} is a name for a GGUF, and a folder is written", hint="give a name without .gguf with -o")
    if not out.exists():
        require_folder(out)
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file, and a folder is written", hint="give another name with -o")
    if not force:
        raise OutputError(f"{out} exists", hint="give another name with -o, or --force to replace it")
    known = {manifest_path(out).name, *Manifest.read(manifest_path(out)).files} if manifest_path(out).exists() else set()
    foreign = sorted(path.name for path in out.iterdir() if path.name not in known)
    if foreign:
        raise OutputError(
            f"{out} holds {foreign[0]}, which quantkit did not write", hint="delete the folder yourself, or choose another"
        )


def folder_name(checkpoint: Checkpoint, fmt: type[TensorFormat]) -> str:
    """The model's name, without an ending such as -BF16, and the format's."""
    return re.sub(r"[-_.](f32|f16|bf16)$", "", checkpoint.path.resolve().name, flags=re.IGNORECASE) + f"-{fmt.name}"


def _weights(checkpoint: HfCheckpoint, plan: FolderPlan) -> Iterator[_Weight]:
    """Every tensor of the source, in its order."""
    for shard in checkpoint.shards:
        for name, entry in shard.entries.items():
            if name not in plan.quantized:
                yield _Weight(name, shard, None, [StoredTensor(name, entry.dtype, entry.shape)])
                continue
            module = name.rpartition(".")[0]
            layout = plan.format.layout(plan.quantized[name])
            yield _Weight(name, shard, plan.format, [StoredTensor(f"{module}.{s}", t.dtype, t.shape) for s, t in layout.items()])


def _shards(weights: list[_Weight], limit: int | None) -> dict[str, list[_Weight]]:
    """File name → what it holds; the tensors of a weight stay together."""
    largest = max(weights, key=lambda w: sum(t.room for t in w.stored))
    if limit is not None and sum(t.room for t in largest.stored) > limit:
        raise PlanError(f"files of {limit:,} bytes are smaller than {largest.name} with a header", hint="allow larger parts")
    parts = into_shards([weight.stored for weight in weights], limit or SHARD_BYTES)
    rest = iter(weights)
    return {name: [next(rest) for _ in part] for name, part in zip(shard_names(len(parts)), parts, strict=True)}


def _write(weights: list[_Weight], writer: SafetensorsWriter, threads: int, advance: Callable[[float], None]) -> dict[str, str]:
    """Write the tensors of one file; returns SHA-256 by weight, of its stored tensors in order of their names."""
    largest = max((w.weights for w in weights if w.format is not None), default=1)
    ahead = max(1, min(threads, IN_FLIGHT_BYTES // (BYTES_PER_WEIGHT * largest)))
    digests = {weight.name: hashlib.sha256() for weight in weights}
    calls = ((weight, call) for weight in weights for call in weight.pieces())
    with ThreadPoolExecutor(ahead) as pool:
        for weight, pieces in in_order(pool, calls, ahead):
            for name, at, bits in sorted(pieces, key=lambda piece: piece[0]):
                writer.write(name, bits, at)
                digests[weight.name].update(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
            advance(sum(bits.nbytes for _, _, bits in pieces))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a small file and make it lasting."""
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _config(checkpoint: HfCheckpoint, plan: FolderPlan) -> str:
    """The source's config.json with a quantization_config."""
    first = next(iter(plan.quantized))
    dtype = next(shard.entries[first].dtype for shard in checkpoint.shards if first in shard.entries)
    config = read_json(checkpoint.path / "config.json")
    return json.dumps(config | {"quantization_config": quantization_config(plan, dtype)}, indent=2) + "\n"


def _manifest(
    checkpoint: HfCheckpoint, plan: FolderPlan, weights: list[_Weight], hashes: dict[str, str], files: dict[str, dict[str, Any]], out: Path
) -> Manifest:  # fmt: skip
    stored = {weight.name: sum(tensor.nbytes for tensor in weight.stored) for weight in weights}
    suffixes = sorted(plan.format.layout(next(iter(plan.quantized.values()))))
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(files.items()))
    return Manifest(
        file=out.name,
        file_bytes=sum(entry["bytes"] for entry in files.values()),
        file_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        header_sha256=files["config.json"]["sha256"],
        bpw=8 * sum(stored.values()) / sum(weight.weights for weight in weights),
        source=source_of(checkpoint),
        plan={"name": plan.name, "label": plan.format.name, "budget": {}, "predicted_kld": None, "suffixes": suffixes},
        tensors={
            w.name: {"format": w.format.name if w.format else w.stored[0].dtype, "bytes": stored[w.name],
                     "sha256": hashes[w.name], "reason": plan.kept.get(w.name, "uniform")}
            for w in weights
        },
        files=files,
        notes=plan.notes,
        versions=package_versions("numpy"),
    )  # fmt: skip
