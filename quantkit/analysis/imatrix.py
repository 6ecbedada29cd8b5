"""imatrix.gguf: activation statistics in the form that llama.cpp's tools read and write.

Layout: llama.cpp, common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp — F32 tensors
``<name>.in_sum2`` (experts × columns) and ``<name>.counts`` (experts × 1).
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
        specs += [TensorSpec(name + SUMS, entry.sum_squares.shape, f32), TensorSpec(name + COUNTS, (len(entry.counts), 1), f32)]
        data += [entry.sum_squares.astype("<f4"), entry.counts.astype("<f4")]
    with write_gguf(path, metadata, specs) as writer:
        for spec, values in zip(specs, data, strict=True):
            writer.write(spec.name, values)


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
        if not np.isfinite(sums).all() or (sums < 0).any():
            raise CalibrationError(
                f"{path.name}: {name} holds a value that is negative or not finite", hint="make the imatrix again"
            )
        stats.tensors[name] = TensorStats(sums.reshape(len(counts), -1), counts)
    return stats


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
