"""Doing it: stream a checkpoint through the encoders into a finished GGUF.

Memory stays bounded by the slices in flight, whatever the model's size and however many threads work. A
tensor that an earlier run of the same model, format, method and statistics has encoded is taken from the
cache in the work directory, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.files import refuse_existing, write_text
from quantkit.checkpoint.gguf_writer import GgufWriter, TensorSpec, file_bytes, header_bytes, write_gguf
from quantkit.encoders import get_encoder
from quantkit.encoders.pins import pin
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import OutputError, PlanError
from quantkit.formats import get_format
from quantkit.planning.artifact import HASH_BYTES, HASHES, bits_per_weight, output_metadata, tensor_specs
from quantkit.planning.plan import Plan
from quantkit.progress import Progress
from quantkit.quantizer.manifest import Manifest, manifest_path, source_of
from quantkit.quantizer.stream import in_order
from quantkit.quantizer.tensor_cache import TensorCache
from quantkit.threads import default_threads, lone_products
from quantkit.versions import package_versions

TENSORS = "tensors"  # folder of encoded tensors in the work directory
SLICE_WEIGHTS = 1 << 22  # weights in one slice at most: 16 MiB of float32
IN_FLIGHT_BYTES = 1 << 29  # memory of all slices that are being read, encoded or wait for the writer
FLUSH_BYTES = 1 << 26  # written data that is sent to the disk while encoding goes on
BYTES_PER_WEIGHT = 16  # of one slice in flight: stored bits, float32, checks, packed bytes

Packed = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """What one run works with."""

    checkpoint: Checkpoint
    plan: Plan
    stats: ActivationStats | None
    cache: TensorCache | None
    threads: int
    given: Mapping[str, Packed] = field(default_factory=dict)  # tensors whose bytes are known already

    def encode(self, info: TensorInfo, expert: int, start: int, stop: int) -> Packed:
        """Read and encode rows start…stop (counted over all experts) of one tensor."""
        return self.encode_rows(self.checkpoint.read_rows(info.name, start, stop), info, expert, start)

    def encode_rows(self, rows: npt.NDArray[np.float32], info: TensorInfo, expert: int, start: int) -> Packed:
        """Encode rows of one expert, float32 (rows, columns), of which the first is row ``start`` of the tensor."""
        entry = self.plan.tensors[info.name]
        importance = None
        if self.stats is not None and info.name in self.stats.tensors:
            importance = self.stats.importance(info.name, expert)
            if importance is None and self.plan.uncovered_as_ones:
                importance = np.ones(info.columns, np.float32)
        first = start - expert * (info.rows // info.experts)
        at = (expert, first) if info.experts > 1 else (first,)
        encoder = get_encoder(entry.method)
        moments = outputs = None
        if self.stats is not None and encoder.needs_moments:
            moments = self.stats.moments_of(info.name, expert)
            outputs = self.stats.outputs_of(info.name, expert, first, first + len(rows)) if encoder.uses_outputs else None
        fmt = get_format(entry.format)
        packed = encoder.encode(rows, importance, fmt, moments=moments, outputs=outputs, threads=1, name=info.name, at=at)
        pins = [(row - start, column) for row, column in entry.pins if start <= row < start + len(rows)]
        return pin(rows, packed, fmt, importance, pins, info.name) if pins else packed

    def slices(self, info: TensorInfo) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, end row) in order; small enough that every thread has work."""
        per_expert = info.rows // info.experts
        limit = min(SLICE_WEIGHTS, IN_FLIGHT_BYTES // (BYTES_PER_WEIGHT * (2 * self.threads + 2)))
        step = max(1, min(limit, max(1 << 18, info.size // (4 * self.threads))) // info.columns)
        if self.stats is not None and get_encoder(self.plan.tensors[info.name].method).uses_outputs:
            together = max(1, self.stats.output_rows(info.name))
            step = -(-step // together) * together
        for expert in range(info.experts):
            for row in range(0, per_expert, step):
                yield expert, expert * per_expert + row, expert * per_expert + min(row + step, per_expert)

    def product_threads(self) -> int:
        """Threads that make matrix products at the same time: methods without full moments make none."""
        return self.threads if any(get_encoder(entry.method).needs_moments for entry in self.plan.tensors.values()) else 1

    def work(self, info: TensorInfo) -> Iterator[Callable[[], Packed]]:
        """The pieces of one tensor as calls, in order: from the cache, or to be encoded."""
        entry = self.plan.tensors[info.name]
        if info.name in self.given:
            yield lambda: self.given[info.name]
            return
        if self.cache is not None and get_format(entry.format).is_quantized():
            known = self.cache.find(self.checkpoint, info, entry, self.stats, self.plan.uncovered_as_ones)
            if known is not None:
                yield from known
                return
        for expert, start, stop in self.slices(info):
            yield lambda e=expert, a=start, b=stop: self.encode(info, e, a, b)  # type: ignore[misc]


def run(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    stats: ActivationStats | None = None,
    cache: Path | None = None,
    force: bool = False,
    threads: int | None = None,
    split_bytes: int | None = None,
    given: Mapping[str, Packed] | None = None,
    notes: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write ``plan`` as a GGUF file with its manifest; returns the manifest (of the first part).

    stats: activation statistics for the encoders (used if the plan says so). cache: folder of encoded
    tensors that are reused and added to. split_bytes: write parts of about this size, named as llama.cpp
    names them, instead of one file. given: bytes of tensors that were encoded elsewhere; notes: what the manifest says
    about them. Raises PlanError if the plan does not fit the model, OutputError if the
    output exists, equals the input or cannot be written; nothing is left under the final name then.
    """
    plan.check(checkpoint)
    checkpoint.require_unquantized()
    used = stats if plan.use_importance else None
    if used is not None and plan.uncovered_as_ones:
        used = used.routed()  # bytes as llama-quantize makes them from imatrix.gguf
    plan.check_importance(used, given or ())
    job = Job(checkpoint, plan, used, TensorCache(cache) if cache else None, threads or default_threads(), given or {})
    parts = split_parts(job, stats, split_bytes)
    paths = part_names(out, len(parts))
    for path in paths:
        check_output(checkpoint, path, force)
    task = (progress or Progress()).task("quantize", total=checkpoint.n_weights, unit="weights")
    written: list[Path] = []
    manifests = []
    try:
        for number, (path, specs) in enumerate(zip(paths, parts, strict=True)):
            metadata = part_metadata(output_metadata(checkpoint, plan, stats), number, parts)
            manifests.append(_write_file(job, path, specs, metadata, task.advance))
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
            manifest_path(path).unlink(missing_ok=True)
        raise
    task.done()
    manifests[0].parts = [path.name for path in paths] if len(paths) > 1 else []
    if notes:
        manifests[0].notes += notes
        write_text(manifest_path(paths[0]), manifests[0].to_json())
    return manifests[0]


def encode_all(
    checkpoint: Checkpoint, plan: Plan, stats: ActivationStats | None, cache: Path | None = None, progress: Progress | None = None,
    given: Mapping[str, Packed] | None = None,
) -> dict[str, Packed]:  # fmt: skip
    """Every quantized tensor of a plan in memory: name → uint8 (rows, bytes per row). given: those known already."""
    used = stats if plan.use_importance else None
    job = Job(checkpoint, plan, used, TensorCache(cache) if cache else None, default_threads(), given or {})
    infos = [info for info in checkpoint.tensors.values() if get_format(plan.tensors[info.name].format).is_quantized()]
    task = (progress or Progress()).task("encode", total=sum(info.size for info in infos), unit="weights")
    calls = ((info.name, call) for info in infos for call in job.work(info))
    pieces: dict[str, list[Packed]] = {info.name: [] for info in infos}
    left = {info.name: get_format(plan.tensors[info.name].format).row_bytes(info.columns) * info.rows for info in infos}
    with ThreadPoolExecutor(job.threads) as pool, lone_products(job.product_threads()):
        for name, piece in in_order(pool, calls, ahead=2 * job.threads + 2):
            pieces[name].append(piece.reshape(-1))
            left[name] -= piece.nbytes
            if job.cache is not None and name not in job.given:
                job.cache.add(name, piece, complete=left[name] == 0)
            if left[name] == 0:
                task.advance(checkpoint.info(name).size)
    task.done()
    return {info.name: np.concatenate(pieces[info.name]).reshape(info.rows, -1) for info in infos}


def decode_all(checkpoint: Checkpoint, plan: Plan, packed: Mapping[str, Packed]) -> dict[str, npt.NDArray[np.float32]]:
    """Packed tensors as they come back from the formats of a plan: float32, each in its own shape."""
    return {
        name: get_format(plan.tensors[name].format).decode(np.ascontiguousarray(rows)).reshape(checkpoint.info(name).shape)
        for name, rows in packed.items()
    }


def check_output(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    """Raise OutputError if ``out`` belongs to the input, or exists and must not be replaced."""
    source = checkpoint.path.resolve()
    ours = {path.resolve() for path in checkpoint.weight_files}
    target = out.resolve()
    if target in ours or (source.is_dir() and target.parent == source and target.exists()):
        raise OutputError(f"{out} is the input itself or lies in its folder", hint="choose another output with -o")
    if target.is_dir():
        raise OutputError(f"{out} is a folder", hint="give a file name with -o, or a format of safetensors folders")
    refuse_existing(out, force)


def part_names(out: Path, count: int) -> list[Path]:
    """``out``, or names by llama.cpp's convention for split files."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.name.removesuffix('.gguf')}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def split_parts(job: Job, stats: ActivationStats | None, split_bytes: int | None) -> list[list[TensorSpec]]:
    """Tensors of each part: one part, or as many as keep each under ``split_bytes``."""
    specs = tensor_specs(job.checkpoint, job.plan)
    if split_bytes is None:
        return [specs]
    metadata = output_metadata(job.checkpoint, job.plan, stats)
    header = file_bytes(metadata, specs) - sum(spec.nbytes for spec in specs) + 256  # and the split keys
    if header + max(spec.nbytes for spec in specs) > split_bytes:
        raise PlanError(
            f"parts of {split_bytes:,} bytes are smaller than the largest tensor with the header", hint="allow larger parts"
        )
    parts: list[list[TensorSpec]] = [[]]
    size = header
    for spec in specs:
        if parts[-1] and size + spec.nbytes > split_bytes:
            parts.append([])
            size = header
        parts[-1].append(spec)
        size += spec.nbytes
    return parts


def part_metadata(metadata: gv.Metadata, number: int, parts: list[list[TensorSpec]]) -> gv.Metadata:
    """Metadata of one part: the first carries everything, the others what says that they belong to it."""
    if len(parts) == 1:
        return metadata
    out = metadata if number == 0 else {key: metadata[key] for key in ("general.architecture", HASHES)}
    return {
        **out,
        HASHES: gv.array(gv.U8, list(bytes(HASH_BYTES * len(parts[number])))),
        "split.no": gv.Value(gv.U16, number),
        "split.count": gv.Value(gv.U16, len(parts)),
        "split.tensors.count": gv.Value(gv.I32, sum(map(len, parts))),
    }


def _write_file(
    job: Job, path: Path, specs: list[TensorSpec], metadata: gv.Metadata, advance: Callable[[float], None]
) -> Manifest:
    """One file and its manifest."""
    started = time.perf_counter()
    with write_gguf(path, metadata, specs) as writer:
        hashes = _write_tensors(job, writer, specs, advance)
        packed = b"".join(bytes.fromhex(digest)[:HASH_BYTES] for digest in hashes.values())
        metadata = {**metadata, HASHES: gv.array(gv.U8, list(packed))}
        writer.replace_metadata(metadata)
        file_digest = _hash_file(writer)
        manifest_path(path).unlink(missing_ok=True)  # of a file that is about to be replaced
    plan, checkpoint = job.plan, job.checkpoint
    manifest = Manifest(
        file=path.name,
        file_bytes=path.stat().st_size,
        file_sha256=file_digest,
        header_sha256=hashlib.sha256(header_bytes(metadata, specs)).hexdigest(),
        bpw=bits_per_weight(checkpoint, plan),
        source=source_of(checkpoint),
        plan={"name": plan.name, "label": plan.label, "budget": plan.budget, "predicted_kld": plan.predicted_kld},
        tensors={
            spec.name: {"format": spec.format.name, "method": plan.tensors[spec.name].method, "bytes": spec.nbytes,
                        "sha256": hashes[spec.name], "reason": plan.tensors[spec.name].reason}
            for spec in specs
        },
        importance=(", ".join(job.stats.datasets) or "imatrix") if job.stats is not None else None,
        versions=package_versions("numpy", "numba"),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    write_text(manifest_path(path), manifest.to_json())
    return manifest


def _write_tensors(job: Job, writer: GgufWriter, specs: list[TensorSpec], advance: Callable[[float], None]) -> dict[str, str]:
    """Encode ahead on all threads across tensors, write in order; returns SHA-256 by tensor."""
    infos = {spec.name: job.checkpoint.info(spec.name) for spec in specs}
    digests = {name: hashlib.sha256() for name in infos}
    left = {spec.name: spec.nbytes for spec in specs}

    def calls() -> Iterator[tuple[str, Callable[[], Packed]]]:
        for name, info in infos.items():
            for call in job.work(info):
                yield name, call

    with contextlib.ExitStack() as stack:
        pool, hasher, flusher = (stack.enter_context(ThreadPoolExecutor(count)) for count in (job.threads, 1, 1))
        stack.enter_context(lone_products(job.product_threads()))
        hashing: Future[None] | None = None
        flushing: Future[None] | None = None
        unflushed = 0
        for name, piece in in_order(pool, calls(), ahead=2 * job.threads + 2):
            if hashing is not None:
                hashing.result()  # one piece behind the writer at most
            hashing = hasher.submit(digests[name].update, piece.reshape(-1).data)
            writer.write(name, piece)
            unflushed += piece.nbytes
            if unflushed >= FLUSH_BYTES and (flushing is None or flushing.done()):
                flushing = flusher.submit(os.fdatasync, writer.handle.fileno())  # so that the last fsync is short
                unflushed = 0
            left[name] -= piece.nbytes
            if job.cache is not None and name not in job.given and get_format(job.plan.tensors[name].format).is_quantized():
                job.cache.add(name, piece, complete=left[name] == 0)
            if left[name] == 0:
                advance(infos[name].size)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _hash_file(writer: GgufWriter) -> str:
    """SHA-256 of the file as it stands, read back while the disk takes what is still on its way."""
    digest = hashlib.sha256()
    handle = writer.handle
    handle.flush()
    with ThreadPoolExecutor(1) as flusher:
        flushing = flusher.submit(os.fdatasync, handle.fileno())
        handle.seek(0)
        while part := handle.read(1 << 22):
            digest.update(part)
        flushing.result()
    return digest.hexdigest()
