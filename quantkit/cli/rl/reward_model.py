"""quantkit rl reward-model: a score learned from pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import guarded
from quantkit.cli.rl.options import rows_of, said, split, training


@click.command("reward-model")
@training(together=16, batch=2, rate=1e-4, epochs=1.0)
@click.option(
    "--center", type=click.FloatRange(min=0), default=0.0, show_default=True, help="How strongly scores are kept near zero."
)
@guarded
def command(base: Path, data: Path, output: Path, fields: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """A reward model: BASE learns to score answers from pairs of which one is the better.

    Rows have prompt, chosen and rejected, texts or messages. The pairs of a tenth of the prompts are kept to measure on. In
    a file of rewards `learned("OUTPUT", "BASE")` is its score.
    """
    from quantkit.rl.reward_model import FIELDS, RewardModelOptions, reward_model

    rows = rows_of(data, fields, FIELDS)
    options, rest = split(values, RewardModelOptions)
    found = reward_model(base, rows, output, options, source=data, **rest)
    said(found, as_json, [
        f"of {found.held} pairs kept apart {found.before:.0%} were ranked right before, {found.after:.0%} are now"
    ])  # fmt: skip
