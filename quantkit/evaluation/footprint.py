"""What running a model takes: load time, tokens per second, memory. Each model is measured alone, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quantkit.checkpoint.documents import typed
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.progress import Progress

PROGRAM = "quantkit.evaluation.footprint_program"


@dataclass(frozen=True)
class Footprint:
    """One sequence at a time, after a warm-up.

    prompt_speed: tokens per second of a prompt of ``prompt_tokens``; speed: of the ``new_tokens`` after it. load_seconds:
    from a file that the system's cache may hold. memory_bytes: the most that the process took, of which model_bytes came
    after the libraries were loaded; on a GPU both are what torch held there. None where the system does not tell.
    """

    load_seconds: float
    prompt_tokens: int
    prompt_speed: float
    new_tokens: int
    speed: float
    memory_bytes: int | None
    model_bytes: int | None

    def to_json(self) -> str:
        """The document as one line."""
        return json.dumps(asdict(self))


def footprints(
    models: Sequence[Path], runtime: str = "torch", device: str = "cpu", progress: Progress | None = None
) -> list[Footprint]:
    """Run each model alone, one after the other, as ``quantkit generate`` runs it: quantized weights stay packed.

    Raises QuantkitError if a model cannot be run, with what its process said.
    """
    task = (progress or Progress()).task("run each model alone", total=len(models), unit="models")
    out = []
    for path in models:
        out.append(_alone(path, runtime, device))
        task.advance()
    task.done()
    return out


def _alone(path: Path, runtime: str, device: str) -> Footprint:
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, str(path), runtime, device], capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        why = "it was killed" if done.returncode == -9 else f"signal {-done.returncode}"
        raise QuantkitError(
            f"running {path.name} alone ended early ({why})", hint="is there enough memory? else leave out --speed"
        )
    line = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(line)
        if done.returncode:
            raise CheckpointError(found["error"], hint=found["hint"])
        return typed(Footprint, found, "footprint")
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise QuantkitError(f"running {path.name} alone failed, it said: {said[:300]}", hint="leave out --speed") from None
