"""The text a comparison runs on when none is given."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"


def default_texts() -> list[Path]:
    """A short excerpt of WikiText-2's test split, shipped with the package; analysis never reads it."""
    return [DATA / "wikitext2-excerpt.txt"]
