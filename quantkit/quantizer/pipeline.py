"""Doing it: stream a checkpoint through the encoders into a finished GGUF.

Memory stays bounded by a few row slices, whatever the model's size. A tensor that an earlier run of the
same model, format, method and statistics has encoded is taken from the cache in the work directory.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from quantkit.checkpoint.files import PositionedFile, atomic_file, refuse_existing, write_text
from quantkit.checkpoint.gguf_writer import GgufWriter, header_bytes, write_gguf
from quantkit.encoders import get_encoder
from quantkit.encoders.base import default_threads
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import OutputError
from quantkit.formats import get_format
from quantkit.planning.artifact import HASH_BYTES, bits_per_weight, output_metadata, tensor_specs
from quantkit.planning.plan import Assignment, Plan
from quantkit.progress import Progress
from quantkit.quantizer.manifest import Manifest, manifest_path

SLICE_WEIGHTS = 1 << 22  # weights in one slice: 16 MiB of float32
AHEAD = 4  # slices that may be read and encoded ahead of the writer, per thread


def run(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    stats: ActivationStats | None = None,
    cache: Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write ``plan`` as a GGUF file with its manifest.

    stats: activation statistics for the encoders (used if the plan says so). cache: folder of encoded
    tensors that are reused and added to. Raises PlanError if the plan does not fit the model, OutputError
    if the output exists, equals the input or cannot be written; nothing is left under the final name then.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    plan.check(checkpoint)
    _check_paths(checkpoint, out, force)
    if isinstance(checkpoint, GgufCheckpoint):
        checkpoint.require_unquantized()
    specs = tensor_specs(checkpoint, plan)
    base = checkpoint.metadata()
    metadata = output_metadata(checkpoint, plan, stats, base=base)
    task = progress.task("quantize", total=checkpoint.n_weights, unit="weights")
    hashes: dict[str, str] = {}
    whole = hashlib.sha256()
    with write_gguf(out, metadata, specs) as writer:
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            for spec in specs:
                info, entry = checkpoint.info(spec.name), plan.tensors[spec.name]
                source = _encoded(checkpoint, info, entry, stats if plan.use_importance else None, cache, pool, threads)
                hashes[spec.name] = _write(writer, spec.name, source)
                task.advance(info.size)
        metadata = output_metadata(checkpoint, plan, stats, _packed_hashes(hashes), base=base)
        writer.replace_metadata(metadata)
        header = header_bytes(metadata, specs)
        _hash_file(writer, whole)
    task.done()
    manifest = Manifest(
        file=out.name,
        file_bytes=out.stat().st_size,
        file_sha256=whole.hexdigest(),
        header_sha256=hashlib.sha256(header).hexdigest(),
        bpw=bits_per_weight(checkpoint, plan),
        source={"name": checkpoint.path.name, "architecture": checkpoint.family.arch, "identity": checkpoint.identity},
        plan={"name": plan.name, "label": plan.label, "budget": plan.budget, "predicted_kld": plan.predicted_kld},
        tensors={
            spec.name: {"format": spec.format.name, "method": plan.tensors[spec.name].method, "bytes": spec.nbytes,
                        "sha256": hashes[spec.name], "reason": plan.tensors[spec.name].reason}
            for spec in specs
        },
        importance=", ".join(stats.datasets) or "imatrix" if stats is not None and plan.use_importance else None,
        versions=_versions(),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    write_text(manifest_path(out), manifest.to_json())
    return manifest


def _check_paths(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    if out.exists() and any(out.samefile(path) for path in checkpoint.weight_files):
        raise OutputError(f"{out} is the input itself", hint="choose another output with -o")
    refuse_existing(out, force)


def _write(writer: GgufWriter, name: str, pieces: Iterator[npt.NDArray[np.uint8]]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.reshape(-1).data)
        writer.write(name, piece)
    return digest.hexdigest()


def _packed_hashes(hashes: dict[str, str]) -> bytes:
    return b"".join(bytes.fromhex(digest)[:HASH_BYTES] for digest in hashes.values())


def _hash_file(writer: GgufWriter, digest: hashlib._Hash) -> None:
    handle = writer.handle
    handle.flush()
    handle.seek(0)
    while part := handle.read(1 << 22):
        digest.update(part)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("quantkit-llm", "numpy", "numba"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def cache_key(checkpoint: Checkpoint, info: TensorInfo, entry: Assignment, stats: ActivationStats | None) -> str:
    """Name of an encoded tensor in the cache: everything its bytes depend on."""
    encoder = get_encoder(entry.method)
    digest = hashlib.sha256(
        f"{checkpoint.identity} {checkpoint.stamp} {info.name} {entry.format} {entry.method} {encoder.version}".encode()
    )
    known = stats.tensors.get(info.name) if stats else None
    if known is not None:
        digest.update(known.sum_squares.tobytes() + known.counts.tobytes())
    return digest.hexdigest()[:32]


def _encoded(
    checkpoint: Checkpoint, info: TensorInfo, entry: Assignment, stats: ActivationStats | None,
    cache: Path | None, pool: ThreadPoolExecutor, threads: int | None,
) -> Iterator[npt.NDArray[np.uint8]]:  # fmt: skip
    """Packed slices of one tensor in order, from the cache or freshly encoded (and then cached)."""
    fmt = get_format(entry.format)
    if cache is None or not fmt.is_quantized():
        yield from _encode_slices(checkpoint, info, entry, stats, pool, threads)
        return
    path = cache / f"{cache_key(checkpoint, info, entry, stats)}.bin"
    total = fmt.row_bytes(info.columns) * info.rows
    if path.exists() and path.stat().st_size == total:
        file = PositionedFile(path)
        for start in range(0, total, SLICE_WEIGHTS):
            yield np.frombuffer(file.read(start, min(SLICE_WEIGHTS, total - start)), np.uint8)
        file.close()
        return
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as handle:
        for piece in _encode_slices(checkpoint, info, entry, stats, pool, threads):
            handle.write(piece.reshape(-1).data)
            yield piece


def _encode_slices(
    checkpoint: Checkpoint, info: TensorInfo, entry: Assignment, stats: ActivationStats | None,
    pool: ThreadPoolExecutor, threads: int | None,
) -> Iterator[npt.NDArray[np.uint8]]:  # fmt: skip
    """Encode slices on all threads, a bounded number ahead of the consumer."""
    fmt, encoder = get_format(entry.format), get_encoder(entry.method)
    ahead = AHEAD * (threads or default_threads())
    pending: deque[Future[npt.NDArray[np.uint8]]] = deque()

    def work(expert: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        rows = checkpoint.read_rows(info.name, start, stop)
        importance = stats.importance(info.name, expert) if stats else None
        return encoder.encode(rows, importance, fmt, threads=1, name=info.name)

    for expert, start, stop in _slices(info, threads or default_threads()):
        pending.append(pool.submit(work, expert, start, stop))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _slices(info: TensorInfo, threads: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) in order; small enough that every thread has work."""
    per_expert = info.rows // info.experts
    wanted = min(SLICE_WEIGHTS, max(1 << 18, info.size // (4 * threads)))
    step = max(1, wanted // info.columns)
    for expert in range(info.experts):
        for row in range(0, per_expert, step):
            yield expert, expert * per_expert + row, expert * per_expert + min(row + step, per_expert)
