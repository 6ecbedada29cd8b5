"""imatrix.gguf: activation statistics in the form that llama.cpp's tools read and write.

Layout: llama.cpp, common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp — F32 tensors
``<name>.in_sum2`` (experts × columns) and ``<name>.counts`` (experts × 1). Ours besides, which llama.cpp skips:
``<name>.gate_sum2`` (experts × 1), and where experts borrowed tokens ``<name>.borrowed_sum2`` and ``<name>.borrowed``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.gguf_writer import TensorSpec, write_gguf
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import CalibrationError
from quantkit.formats import get_format

SUMS, COUNTS = ".in_sum2", ".counts"
GATES, BORROWED_SUMS, BORROWED = ".gate_sum2", ".borrowed_sum2", ".borrowed"


IDENTITY = "quantkit.model_identity"


def write_imatrix(path: Path, stats: ActivationStats) -> None:
    """Write statistics as an imatrix.gguf (atomically)."""
    f32 = get_format("F32")
    metadata: gv.Metadata = {
        "general.type": gv.string("imatrix"),
        "imatrix.datasets": gv.array(gv.STRING, list(stats.datasets)),
        "imatrix.chunk_count": gv.u32(stats.chunks),
        "imatrix.chunk_size": gv.u32(stats.chunk_size),
    }
    if stats.identity:
        metadata[IDENTITY] = gv.string(stats.identity)
    specs: list[TensorSpec] = []
    data: list[np.ndarray] = []
    for name, entry in sorted(stats.tensors.items()):
        parts = {
            SUMS: entry.sum_squares, COUNTS: entry.counts, GATES: entry.gate_squares,
            BORROWED_SUMS: entry.borrowed_squares, BORROWED: entry.borrowed,
        }  # fmt: skip
        for suffix, values in parts.items():
            if values is not None:
                data.append(values.reshape(len(entry.counts), -1).astype("<f4"))
                specs.append(TensorSpec(name + suffix, data[-1].shape, f32))
    with write_gguf(path, metadata, specs) as writer:
        for spec, rows in zip(specs, data, strict=True):
            writer.write(spec.name, rows)


def read_imatrix(path: Path) -> ActivationStats:
    """Read an imatrix.gguf, ours or llama-imatrix's.

    Raises CalibrationError if it is not one, is incomplete or holds values that are not finite.
    """
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}", hint="check the path given with --imatrix") from None
    if magic != gv.MAGIC:
        raise CalibrationError(
            f"{path.name} is not a GGUF imatrix (the old .dat format has no token counts)",
            hint="make it again with a current llama-imatrix",
        )
    file = GgufFile(path)
    values = gv.plain(file.metadata)
    names = {name[: -len(SUMS)] for name in file.entries if name.endswith(SUMS)}
    if values.get("general.type") != "imatrix" or not names:
        raise CalibrationError(f"{path.name} is not an imatrix", hint="give the output of `quantkit analyze` or llama-imatrix")
    stats = ActivationStats(
        datasets=tuple(values.get("imatrix.datasets", ())),
        chunks=int(values.get("imatrix.chunk_count", 0)),
        chunk_size=int(values.get("imatrix.chunk_size", 512)),
        identity=str(values.get(IDENTITY, "")),
    )
    for name in sorted(names):
        if name + COUNTS not in file.entries:
            raise CalibrationError(f"{path.name} has sums but no counts for {name}", hint="the file is damaged; make it again")
        sums, counts = (_read(file, name + suffix) for suffix in (SUMS, COUNTS))
        counts = counts.reshape(-1)
        if sums.size % counts.size:
            raise CalibrationError(
                f"{path.name}: {sums.size} sums for {counts.size} counts of {name}", hint="make the imatrix again"
            )
        rest = [
            _read(file, name + suffix) if name + suffix in file.entries else None for suffix in (GATES, BORROWED_SUMS, BORROWED)
        ]
        if any(part is not None and (not np.isfinite(part).all() or (part < 0).any()) for part in (sums, *rest)):
            raise CalibrationError(
                f"{path.name}: {name} holds a value that is negative or not finite", hint="make the imatrix again"
            )
        stats.tensors[name] = _entry(path, name, sums.reshape(len(counts), -1), counts, *rest)
    return stats


def _entry(
    path: Path, name: str, sums: np.ndarray, counts: np.ndarray, gates: np.ndarray | None, borrowed_sums: np.ndarray | None,
    borrowed: np.ndarray | None,
) -> TensorStats:  # fmt: skip
    """The statistics of one tensor, in their shapes."""
    sizes = [
        (gates, counts.size), (borrowed, counts.size), (borrowed_sums, sums.size),
    ]  # fmt: skip
    if any(part is not None and part.size != size for part, size in sizes) or (borrowed is None) != (borrowed_sums is None):
        raise CalibrationError(f"{path.name}: what is kept of the experts of {name} does not fit", hint="make the imatrix again")
    return TensorStats(
        sums, counts, None if gates is None else gates.reshape(-1),
        None if borrowed_sums is None else borrowed_sums.reshape(sums.shape), None if borrowed is None else borrowed.reshape(-1),
    )  # fmt: skip


def _read(file: GgufFile, name: str) -> np.ndarray:
    shape = file.entries[name].shape
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return file.read_rows(name, 0, rows)


def check_stats(stats: ActivationStats, checkpoint: Checkpoint) -> None:
    """Raise CalibrationError if the statistics belong to another model."""
    known = [name for name in stats.tensors if name in checkpoint.tensors]
    if not known or (stats.identity and stats.identity != checkpoint.identity):
        raise CalibrationError("the imatrix belongs to another model", hint="run `quantkit analyze` on this one")
    for name in known:
        info, entry = checkpoint.info(name), stats.tensors[name]
        if entry.sum_squares.shape[1] != info.columns or len(entry.counts) not in (1, info.experts):
            raise CalibrationError(
                f"the imatrix has {entry.sum_squares.shape} values for {name}, the model needs ({info.experts}, {info.columns})",
                hint="it belongs to another model; run `quantkit analyze`",
            )
        if len(entry.counts) == 1 and info.experts > 1:  # llama-imatrix folds equal counts
            stats.tensors[name] = TensorStats(
                np.repeat(entry.sum_squares, info.experts, axis=0), np.repeat(entry.counts, info.experts)
            )


def load_stats(path: Path, checkpoint: Checkpoint) -> ActivationStats:
    """Read an imatrix and check that it belongs to the model. Raises CalibrationError if not."""
    stats = read_imatrix(path)
    check_stats(stats, checkpoint)
    return stats
