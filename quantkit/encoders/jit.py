"""Where Numba keeps its compiled code, and the message while it compiles."""

from __future__ import annotations

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


def announce(function: str) -> None:
    """Say on stderr that ``function`` is about to be compiled, if no compiled version is cached."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR", ""))
    if not any(folder.rglob(f"*.{function}-*.nbi")):
        print(f"compiling {function} (once; a few seconds)", file=sys.stderr, flush=True)
