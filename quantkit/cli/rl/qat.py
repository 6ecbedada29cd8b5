"""quantkit rl qat: healing what quantizing took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded
from quantkit.cli.rl.options import PATH, said, split, training


@click.command("qat")
@training(together=16, batch=4, rate=None, epochs=1.0, rows=False)
@click.option("--teacher", required=True, type=PATH, help="The model that was quantized.")
@click.option("--window", type=click.IntRange(min=16), default=256, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--learn",
    type=click.Choice(["adapter", "scales"]),
    default="adapter",
    show_default=True,
    help="What learns; scales (with minimums, norms, biases) become a new file of BASE's own types.",
)
@click.option("--activations", type=click.Choice(["INT8", "FP8", "FP4"]), help="Round the inputs of all maps while training.")
@click.option(
    "--residual/--no-residual",
    default=True,
    show_default=True,
    help="An adapter begins with the largest part of what quantizing took.",
)
@guarded
def command(base: Path, data: tuple[Path, ...], output: Path, as_json: bool, **values: Any) -> None:
    """Heal: bring BASE's outputs back to the original's, on plain text.

    A tenth of the text is kept to measure on. Either an adapter learns (`rl export` writes it for llama.cpp, or merges it),
    or the scales of BASE themselves (OUTPUT/healed.gguf, as large as BASE).
    """
    from quantkit.rl.heal import heal
    from quantkit.rl.options import HealOptions

    options, rest = split(values, HealOptions)
    found = heal(base, rest.pop("teacher"), list(data), output, options, **rest)
    rounded = f" with {options.activations} activations" if options.activations else ""
    began = "" if found.file else f", {found.begun:.4g} as the adapter began"
    lines = [
        f"KL divergence from the original{rounded} on text kept apart: {found.base:.4g} nats/token before{began}, {found.healed:.4g} healed"
    ]
    if as_json:
        from dataclasses import asdict

        outcome = {**asdict(found.outcome), "folder": str(found.outcome.folder)}
        emit_json({**asdict(found), "outcome": outcome, "file": None if found.file is None else str(found.file)})
        return
    said(found.outcome, as_json, [*lines, *([f"{found.file} is the healed model"] if found.file else [])])
