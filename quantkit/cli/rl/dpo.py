"""quantkit rl dpo: preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import guarded
from quantkit.cli.rl.options import rows_of, said, split, training


@click.command("dpo")
@training(together=16, batch=2, rate=1e-5, epochs=1.0)
@click.option(
    "--loss", type=click.Choice(["dpo", "kto"]), default="dpo", show_default=True, help="Pairs, or single answers with a label."
)
@click.option(
    "--beta", type=float, default=0.1, show_default=True, help="How strongly the model is held to where training began."
)
@guarded
def command(base: Path, data: Path, output: Path, fields: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Preferences: which of two answers is the better one, or (--loss kto) whether an answer is good.

    Rows have prompt, chosen and rejected; for kto prompt, completion and label (true or false).
    """
    from quantkit.rl import train
    from quantkit.rl.options import DpoOptions

    rows = rows_of(data, fields, ("prompt", "chosen", "rejected") if values["loss"] == "dpo" else ("prompt", "completion"))
    if values["loss"] == "kto":
        from quantkit.rl.data import require_labels

        require_labels(rows, data)
    options, rest = split(values, DpoOptions)
    said(train.dpo(base, rows, output, options, **rest), as_json, [])
