"""Positioned reads with bounds, and files that appear under their name only when complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import CheckpointError, OutputError

LFS_MAGIC = b"version https://git-lfs"


class PositionedFile:
    """A file that is read at offsets only, so that any number of threads can share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = open(path, "rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from None
        self.size = os.fstat(self._handle.fileno()).st_size

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly ``length`` bytes at ``offset``; raises CheckpointError if the file ends before."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return buffer

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` (bytes) from ``offset``; raises CheckpointError if the file ends before."""
        length = target.nbytes
        if offset < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path.name} is truncated: bytes {offset}…{offset + length} of a file of {self.size} bytes",
                hint="download the file again",
            )
        done = 0
        flat = target.cast("B") if target.format != "B" else target
        while done < length:
            try:
                got = os.preadv(self._handle.fileno(), [flat[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}", hint="check the disk") from None
            if got <= 0:
                raise CheckpointError(f"{self.path.name} ended at byte {offset + done}", hint="download the file again")
            done += got

    def refuse_lfs_pointer(self) -> None:
        """Raise CheckpointError if this is a Git LFS pointer instead of the file itself."""
        if self.size < 1024 and bytes(self.read(0, min(self.size, len(LFS_MAGIC)))) == LFS_MAGIC:
            raise CheckpointError(
                f"{self.path} is a Git LFS pointer, not the weights", hint="run `git lfs pull` in the model's folder"
            )

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Raises CheckpointError if it cannot be read or is something else."""
    hint = "download the file again"
    try:
        raw = path.read_bytes()
        if raw.startswith(LFS_MAGIC):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file", hint="run `git lfs pull` in the model's folder")
        found = json.loads(raw)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})", hint=hint) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object", hint=hint)
    return found


def refuse_existing(path: Path, force: bool) -> None:
    """Raise OutputError if ``path`` exists and must not be replaced."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists", hint="give another name with -o, or --force to replace it")


def require_folder(path: Path) -> None:
    """Raise OutputError unless the folder of ``path`` exists and can be written."""
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"folder {folder} does not exist", hint="create it or choose another output")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"folder {folder} cannot be written", hint="choose another output")


@contextlib.contextmanager
def atomic_file(path: Path, expected_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; rename it to ``path`` only if the block succeeds.

    With ``expected_bytes`` the disk's free space is checked first. Raises OutputError if the folder is
    missing, cannot be written or the disk is full; then nothing is left under any name.
    """
    require_folder(path)
    _require_space(path, expected_bytes)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    with _disk_errors(path):
        try:
            with open(part, "w+b") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, expected_bytes: int, replace: bool) -> Iterator[Path]:
    """Make a temporary folder beside ``path``; rename it to ``path`` only if the block succeeds.

    The block makes its files lasting itself. With ``replace`` a folder under that name is moved away and deleted
    last. Raises OutputError as ``atomic_file`` does, and if the name is taken; then nothing is left but what was
    there before.
    """
    require_folder(path)
    _require_space(path, expected_bytes)
    part, old = (path.parent / f".{path.name}.{os.getpid()}.{kind}" for kind in ("part", "old"))
    with _disk_errors(path):
        try:
            for leftover in (part, old):  # of a process that was killed and had our number
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir()
            yield part
            sync_folder(part)
            refuse_existing(path, replace)
            if path.exists():
                os.rename(path, old)
            os.rename(part, path)
            sync_folder(path.parent)
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)
            for folder in (part, old):
                shutil.rmtree(folder, ignore_errors=True)


def _require_space(path: Path, expected_bytes: int | None) -> None:
    """Raise OutputError if the disk has less than ``expected_bytes`` free."""
    if expected_bytes is None:
        return
    stat = os.statvfs(path.parent)
    free = stat.f_bavail * stat.f_frsize
    if free < expected_bytes:
        raise OutputError(
            f"{path.name} needs {expected_bytes:,} bytes but {path.parent} has {free:,} free",
            hint="free space or choose another output with -o",
        )


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"no space left while writing {path}", hint="free space; nothing was left behind") from None
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another output with -o") from None


def sync_folder(folder: Path) -> None:
    """Make names in a folder lasting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as handle:
        handle.write(text.encode())
