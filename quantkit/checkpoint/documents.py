"""JSON documents as dataclasses, where what does not fit the types is refused by its place, and as strict text."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def typed(kind: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as ``kind``: a dataclass, tuple, list, dict, or plain type. Raises ValueError where it does not fit.

    null counts as a float that is not finite; fields of a dataclass must all be there, and no others.
    """
    arguments = get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        names = {field.name for field in fields(kind)}
        if not isinstance(value, dict) or value.keys() != names:
            odd = ", ".join(sorted(names ^ value.keys())) if isinstance(value, dict) else repr(value)[:40]
            raise ValueError(f"{where} misses or misnames: {odd}")
        hints = get_type_hints(kind)
        return kind(**{name: typed(hints[name], value[name], f"{where}, {name}") for name in names})
    if isinstance(kind, UnionType):
        return None if value is None else typed(arguments[0], value, where)
    if kind is float:
        if value is None:
            return math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif get_origin(kind) in (tuple, list) and isinstance(value, list):
        return get_origin(kind)(typed(arguments[0], entry, where) for entry in value)
    elif get_origin(kind) is dict and isinstance(value, dict):
        return {str(key): typed(arguments[1], entry, where) for key, entry in value.items()}
    elif kind is Any or (isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {value!r:.40}")


def strict_json(document: Any, indent: int | None = None) -> str:
    """The document as text that every reader of JSON takes: numbers that are not finite are null."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
