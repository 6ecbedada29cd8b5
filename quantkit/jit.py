"""Where Numba keeps its compiled code, and the message while it compiles."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """A writable folder for things that are made once: ``$QUANTKIT_CACHE`` or ``~/.cache/quantkit``."""
    wanted = Path(os.environ.get("QUANTKIT_CACHE") or Path.home() / ".cache" / "quantkit")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return wanted
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="quantkit-"))


def prepare_cache() -> None:
    """Point Numba's cache at a folder of ours, so that a read-only site-packages does no harm."""
    if "numba" in sys.modules or os.environ.get("NUMBA_CACHE_DIR"):
        return
    from importlib.metadata import version

    folder = cache_root() / f"numba-{version('numba')}-py{sys.version_info.major}{sys.version_info.minor}"
    os.environ["NUMBA_CACHE_DIR"] = str(folder)


def announce(what: str, source: Path) -> None:
    """Say on stderr that ``what`` is about to be compiled, unless it was since ``source`` (its module) changed."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_root())
    seen = folder / f"{what}-{source.stat().st_mtime_ns:x}.seen"
    if seen.exists():
        return
    print(f"compiling {what} (once; a few seconds)", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs the message again
        folder.mkdir(parents=True, exist_ok=True)
        seen.touch()
