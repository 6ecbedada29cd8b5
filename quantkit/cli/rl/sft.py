"""quantkit rl sft: supervised priming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import guarded
from quantkit.cli.rl.options import rows_of, said, split, training


@click.command("sft")
@training(together=16, batch=4, rate=2e-4, epochs=2.0)
@guarded
def command(base: Path, data: Path, output: Path, fields: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Supervised priming: a few dozen rows teach a format.

    Rows have prompt and completion, or messages (then the template must mark what the model says). Only the completion
    counts for the loss, and every token of a step alike.
    """
    from quantkit.rl import train
    from quantkit.rl.advice import advice_for_sft
    from quantkit.rl.options import SftOptions

    rows = rows_of(data, fields, ())
    from quantkit.rl.data import require_fields

    require_fields(rows, ("messages",) if "messages" in rows[0] else ("prompt", "completion"), data)
    options, rest = split(values, SftOptions)
    outcome = train.sft(base, rows, output, options, **rest)
    said(outcome, as_json, advice_for_sft(outcome.log))
