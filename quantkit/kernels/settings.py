"""How programs are cut to a GPU: closed-form choices, or what ``quantkit tune`` measured to be faster on this one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import FormatError
from quantkit.jit import cache_root

if TYPE_CHECKING:
    import torch

VERSION = 1
KIND = "quantkit_kernels"


@dataclass(frozen=True)
class Settings:
    """Sizes of programs.

    few: tokens up to which a program reads the weights once for each. some: tokens up to which weights are decoded into
    registers, above torch multiplies decoded panels. rows: of a tile; narrow: rows where values come from tables or code
    books (with more, registers do not suffice). warps: of a program that makes a tile. row_outputs, row_weights: outputs
    of a program for few tokens, and weights of a row that it decodes at a time. decoded: weights of one piece of its
    blocks that a decoding program takes, 16 for each of its threads.
    """

    few: int = 8
    some: int = 256
    rows: int = 64
    narrow: int = 32
    warps: int = 8
    row_outputs: int = 4
    row_weights: int = 512
    decoded: int = 2048


CANDIDATES: dict[str, tuple[int, ...]] = {
    "decoded": (1024, 4096, 8192), "row_outputs": (1, 2, 8, 16), "row_weights": (256, 1024, 2048), "few": (1, 2, 4, 16),
    "rows": (32, 128), "narrow": (16, 64), "warps": (4,), "some": (64, 128, 512, 1024),
}  # fmt: skip
_override: list[Settings] = []


def settings_path(name: str) -> Path:
    """Where the settings of a GPU of this name are kept."""
    return cache_root() / "kernels" / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"


def settings_of(data: torch.Tensor) -> Settings:
    """The settings for the device of a tensor. Raises FormatError if the kept ones are damaged."""
    import torch

    if _override:
        return _override[-1]
    return _kept(torch.cuda.get_device_name(data.device)) if data.device.type == "cuda" else Settings()


@cache
def _kept(name: str) -> Settings:
    path = settings_path(name)
    if not path.exists():
        return Settings()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known[KIND] != VERSION:
            raise ValueError(known[KIND])
        return Settings(**{field.name: int(known["settings"][field.name]) for field in fields(Settings)})
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path} is damaged", hint="delete it, or run quantkit tune again") from None


@contextlib.contextmanager
def using(settings: Settings) -> Iterator[None]:
    """Take these settings meanwhile, on every device."""
    _override.append(settings)
    try:
        yield
    finally:
        _override.pop()


def document(settings: Settings, **facts: object) -> str:
    """The file's text."""
    return json.dumps({KIND: VERSION, "settings": asdict(settings), **facts}, indent=1)
