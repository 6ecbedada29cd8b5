"""From what a user asks for (bits per weight, a size, a card, a file) to a budget in file bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.gguf_checkpoint import split_files
from quantkit.checkpoint.gguf_writer import header_bytes
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError
from quantkit.planning.artifact import output_metadata, stock_bytes, tensor_specs
from quantkit.planning.memory import Run, overhead
from quantkit.planning.standard import ALIASES, BASE, standard_plan, uniform_plan

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
         "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # fmt: skip


def parse_size(text: str) -> int:
    """``4.2GiB``, ``700MB``, ``3781472`` → bytes. Raises PlanError if it is none of these."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match.group(2).upper() not in UNITS:
        raise PlanError(f"{text!r} is not a size", hint="for example 4.2GiB, 700MB or 3781472")
    size = float(match.group(1)) * UNITS[match.group(2).upper()]
    if size <= 0:
        raise PlanError(f"the size {text!r} is not positive")
    return int(size)


@dataclass(frozen=True)
class Request:
    """The one dial. At most one of ``bpw``, ``size``, ``fit`` and ``like``; none means like Q4_K_M."""

    bpw: float | None = None
    size: str | None = None
    fit: str | None = None
    like: str | None = None
    run: Run = field(default_factory=Run)

    @staticmethod
    def of(keywords: dict[str, Any]) -> Request:
        """Take the fields of a request out of ``keywords``."""
        return Request(**{field.name: keywords.pop(field.name) for field in fields(Request) if field.name in keywords})

    @property
    def given(self) -> list[str]:
        """Names of the sizes that were asked for: none or one."""
        return [name for name in ("bpw", "size", "fit", "like") if getattr(self, name) is not None]

    def __post_init__(self) -> None:
        given = self.given
        if len(given) > 1:
            raise PlanError(f"--{given[0]} and --{given[1]} exclude each other", hint="give one of them")
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise PlanError(f"--bpw {self.bpw} is out of range", hint="give a number above 0 and at most 32")
        for text in (self.size, self.fit):
            if text is not None:
                parse_size(text)
        if self.like is not None and self.like.upper() not in {*BASE, *ALIASES} and not Path(self.like).is_file():
            raise PlanError(f"--like {self.like!r} is neither a standard mix nor a file", hint=f"mixes: {', '.join(BASE)}")


def budget_bytes(request: Request, checkpoint: Checkpoint, stats: ActivationStats | None) -> tuple[int, dict[str, object]]:
    """(file bytes, how they were asked for). Raises PlanError if the request is impossible."""
    if request.bpw is not None:
        return _header(checkpoint, stats) + int(request.bpw * checkpoint.n_weights / 8), {"bpw": request.bpw}
    if request.size is not None:
        return parse_size(request.size), {"size": request.size}
    if request.fit is not None:
        return _fit(request.fit, request.run, checkpoint)
    like = request.like or "Q4_K_M"
    if like.upper() in BASE or like.upper() in ALIASES:
        return stock_bytes(checkpoint, standard_plan(checkpoint, like, stats), stats), {"like": like}
    size = sum(part.stat().st_size for part in split_files(Path(like)))
    return size, {"like": Path(like).name, "file_bytes": size}


def _header(checkpoint: Checkpoint, stats: ActivationStats | None) -> int:
    plan = uniform_plan(checkpoint, "F16", stats)
    return len(header_bytes(output_metadata(checkpoint, plan, stats), tensor_specs(checkpoint, plan)))


def _fit(text: str, run: Run, checkpoint: Checkpoint) -> tuple[int, dict[str, object]]:
    memory, rest = parse_size(text), overhead(checkpoint, run)
    left = memory - rest.total
    if left <= 0:
        raise PlanError(
            f"{text} is less than the KV cache ({rest.kv_cache:,} bytes) and compute buffers ({rest.compute + rest.output:,} bytes) alone",
            hint="ask for a shorter --context or a smaller --kv-type",
        )
    return left, {
        "fit": text, "context": run.context, "kv_type": run.kv_type, "kv_cache_bytes": rest.kv_cache,
        "compute_bytes": rest.compute + rest.output,
    }  # fmt: skip
