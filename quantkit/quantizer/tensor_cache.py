"""Encoded tensors of earlier runs, by everything that their bytes depend on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.files import PositionedFile
from quantkit.encoders import get_encoder
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import get_format
from quantkit.planning.plan import Assignment

CHUNK = 1 << 22
STALE_SECONDS = 86400
LIMIT_BYTES = 64 << 30  # the least recently used tensors go when the cache grows beyond this


def cache_key(
    checkpoint: Checkpoint, info: TensorInfo, entry: Assignment, stats: ActivationStats | None, ones: bool = False
) -> str:
    """Name of an encoded tensor: model, its files' sizes and times, format, method, statistics.

    ones: whether experts without statistics are weighed with ones.
    """
    encoder = get_encoder(entry.method)
    version = encoder.version
    digest = hashlib.sha256(
        f"{checkpoint.identity} {checkpoint.stamp} {info.name} {entry.format} {entry.method} {version}".encode()
    )
    if entry.pins:
        digest.update(str(entry.pins).encode())
    if encoder.needs_moments and stats is not None and stats.moments is not None:
        digest.update(stats.moments.key.encode())
    known = stats.tensors.get(info.name) if stats else None
    if known is not None:
        digest.update(known.tobytes())
        if known.uncovered:
            digest.update(str(ones).encode())
    return digest.hexdigest()[:32]


class TensorCache:
    """A folder of packed tensors. Losing it costs time only: its own failures never stop a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: dict[str, Path] = {}
        self._open: dict[str, BinaryIO | None] = {}

    def find(
        self, checkpoint: Checkpoint, info: TensorInfo, entry: Assignment, stats: ActivationStats | None, ones: bool
    ) -> Iterator[Callable[[], npt.NDArray[np.uint8]]] | None:
        """Calls that read the tensor piece by piece, or None if it has to be encoded (and will be added)."""
        path = self._folder / f"{cache_key(checkpoint, info, entry, stats, ones)}.bin"
        total = get_format(entry.format).row_bytes(info.columns) * info.rows
        try:
            if path.stat().st_size == total:
                os.utime(path)
                return self._pieces(path, total)
        except OSError:
            pass  # not there, or not ours: encode it
        self._keys[info.name] = path
        return None

    @staticmethod
    def _pieces(path: Path, total: int) -> Iterator[Callable[[], npt.NDArray[np.uint8]]]:
        file = PositionedFile(path)
        for start in range(0, total, CHUNK):
            yield lambda a=start: np.frombuffer(file.read(a, min(CHUNK, total - a)), np.uint8)  # type: ignore[misc]

    def add(self, name: str, piece: npt.NDArray[np.uint8], complete: bool) -> None:
        """Append a freshly encoded piece; with ``complete`` the tensor appears under its key."""
        path = self._keys.get(name)
        if path is None:  # it came from here
            return
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            if name not in self._open:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._open[name] = open(part, "wb")  # noqa: SIM115 (closed when complete)
            handle = self._open[name]
            if handle is None:
                return
            handle.write(piece.reshape(-1).data)
            if complete:
                handle.close()
                os.replace(part, path)
                self._keys.pop(name)
                self._prune()
        except OSError:
            handle = self._open.get(name)
            if handle is not None:
                handle.close()
            self._open[name] = None  # go on without the cache
            with contextlib.suppress(OSError):
                part.unlink()

    def _prune(self) -> None:
        for part in self._folder.glob("*.part"):  # of runs that were killed
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink(missing_ok=True)
        files = sorted(self._folder.glob("*.bin"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= LIMIT_BYTES:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
