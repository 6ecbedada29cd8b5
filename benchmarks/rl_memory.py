"""Memory of a step of GRPO: by formula, measured on the small models, and on paper for 8B.

make bench-rl-memory
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import SHARED, write_results

import quantkit
from quantkit.checkpoint import open_checkpoint
from quantkit.planning.memory import Shape
from quantkit.rl.memory import Step, StepMemory, measured_step, step_memory, weights_in_memory

MODELS = ("qk-dense-6m", "qk-moe-11m")
STEP = Step(sequences=4, prompt=96, completion=32, drawn=16)
LLAMA_8B = Shape("llama", 32, 4096, 32, 8, 128, 128256, 14336)
WEIGHTS_8B = int(8.03e9 * 4.9 / 8)  # Q4_K_M's bits per weight
PAPER = Step(sequences=1, prompt=256, completion=1792, drawn=8, itemsize=2, saving=True, offloaded=True, panels=True)


def row(what: str, step: Step, told: StepMemory, found: StepMemory | None) -> dict[str, Any]:
    """A line of the table, printed as well. Bytes."""
    out: dict[str, Any] = {
        "model": what,
        "step": asdict(step),
        "formula": {**asdict(told), "peak": told.peak, "second_copy": told.second_copy},
    }
    text = f"{what}, {'saving' if step.saving else 'plain'}: formula {told.peak / 1e6:.1f} MB"
    if found is not None:
        out["measured"] = {**asdict(found), "peak": found.peak, "second_copy": found.second_copy}
        text += f"; measured {found.peak / 1e6:.1f} MB; a second copy of the weights would add {found.second_copy / 1e6:.1f} MB"
    print(text, flush=True)
    return out


def main() -> None:
    """Writes benchmarks/results/rl-memory.json."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in MODELS:
            base = Path(temporary, f"{name}.gguf")
            quantkit.quantize(SHARED / "models" / name, base, "standard:Q4_K_M", use_importance=False)
            checkpoint = open_checkpoint(base)
            for saving in (False, True):
                for itemsize in (4, 2):
                    step = replace(STEP, saving=saving, itemsize=itemsize)
                    told = step_memory(Shape.of(checkpoint), weights_in_memory(checkpoint, itemsize), step)
                    rows.append(row(f"{name}, {8 * itemsize}-bit activations", step, told, measured_step(base, step)))
    for sequences in (1, 8):
        step = replace(PAPER, sequences=sequences)
        rows.append(row("Llama 3 8B, on paper", step, step_memory(LLAMA_8B, WEIGHTS_8B, step), None))
    print(f"written: {write_results('rl-memory', 'make bench-rl-memory', rows)}")


if __name__ == "__main__":
    main()
