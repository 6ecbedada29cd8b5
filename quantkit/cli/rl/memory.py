"""quantkit rl memory: will a step of training fit?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table, size
from quantkit.cli.rl.options import PATH


@click.command("memory")
@click.argument("base", type=PATH)
@click.option(
    "--batch", "sequences", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences in memory while training."
)
@click.option("--prompt", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a prompt.")
@click.option("--completion", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a completion.")
@click.option(
    "--together",
    "drawn",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Completions of a step; 64 are drawn at a time.",
)
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter.")
@click.option("--experts", is_flag=True, help="Every routed expert has a pair of its own.")
@click.option("--save-memory", "saving", is_flag=True, help="Only each layer's input is kept while training.")
@click.option("--reference", is_flag=True, help="With a divergence (--beta), for which a copy of the adapter is kept.")
@click.option(
    "--device", default="cpu", show_default=True, help="cpu (activations in float32) or cuda (bfloat16, kept inputs on the CPU)."
)
@click.option("--measure", "measuring", is_flag=True, help="Also run a step with random tokens, and count.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(base: Path, device: str, measuring: bool, as_json: bool, **values: Any) -> None:
    """Memory of a step of GRPO on BASE, by formula and, with --measure, by trying.

    Drawing completions and training alternate: the peak has the larger of the two.
    """
    from dataclasses import asdict

    from quantkit.checkpoint import open_checkpoint
    from quantkit.planning.memory import Shape
    from quantkit.rl.memory import Step, measured_step, step_memory, weights_in_memory
    from quantkit.rl.rollouts import BATCH

    gpu = device != "cpu"
    values["drawn"] = min(values["drawn"], BATCH)
    step = Step(**values, itemsize=2 if gpu else 4, offloaded=gpu, panels=gpu)
    checkpoint = open_checkpoint(base)
    found = {"formula": step_memory(Shape.of(checkpoint), weights_in_memory(checkpoint, step.itemsize), step)}
    if measuring:
        found["measured"] = measured_step(base, step, device)
    if as_json:
        emit_json(
            {name: {**asdict(memory), "peak": memory.peak, "second_copy": memory.second_copy} for name, memory in found.items()}
        )
        return
    kinds = {"weights": "weights of the base", "adapter": "adapter, gradients, optimizer", "drawing": "drawing completions",
             "training": "training", "peak": "peak"}  # fmt: skip
    table = [[words, *(size(getattr(memory, kind)) for memory in found.values())] for kind, words in kinds.items()]
    print_table(f"A step on {checkpoint.path.name}", ["", *found], table)
    click.echo(
        f"Completions are drawn with the very weights that are trained on; a copy for that would add {size(found['formula'].second_copy)}."
    )
