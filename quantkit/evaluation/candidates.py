"""What a user names: models, and ``FILE+ADAPTER``; and the names under which several of them are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.checkpoint.adapter import AdaptedCheckpoint, read_adapter


def split_adapter(path: Path) -> tuple[Path, Path | None]:
    """The model and the low-rank adapter of ``FILE+ADAPTER``; a path that exists is a model, whatever its name."""
    file, sign, adapter = str(path).rpartition("+")
    return (Path(file), Path(adapter)) if sign and not path.exists() else (path, None)


def open_candidate(path: Path) -> Checkpoint:
    """A model, or ``FILE+ADAPTER``: a model with a low-rank adapter added. Raises CheckpointError if they do not fit."""
    file, adapter = split_adapter(path)
    return open_checkpoint(file) if adapter is None else AdaptedCheckpoint(open_checkpoint(file), read_adapter(adapter))


def shown_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path, no two alike: the file's, with as many folders as tell it from others; a number if it comes again."""
    keys = [tuple(one.resolve() for one in split_adapter(path) if one is not None) for path in paths]
    names = dict.fromkeys(keys, "")
    parts = 0
    while len(set(names.values())) < len(names) or not parts:
        parts += 1
        known = Counter(names.values())
        names = {key: _name(key, parts) if known[name] > 1 or not name else name for key, name in names.items()}
    seen: Counter[Any] = Counter()
    out = []
    for key in keys:
        seen[key] += 1
        out.append(names[key] if seen[key] == 1 else f"{names[key]} ({seen[key]})")
    return out


def _name(key: Sequence[Path], parts: int) -> str:
    return "+".join("/".join(path.parts[-parts:]) for path in key)
