"""quantkit rl sample: completions that the rewards accept, as rows for another round of priming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded
from quantkit.cli.rl.options import PATH, drawing, rows_of


@click.command("sample")
@drawing
@click.option("-o", "--output", required=True, type=PATH, help="JSON lines for `rl sft --data`.")
@click.option("-n", "count", type=click.IntRange(min=1), default=8, show_default=True, help="Completions of each prompt.")
@click.option(
    "--keep", type=click.IntRange(min=1), default=1, show_default=True, help="Of the accepted ones of a prompt at most."
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@guarded
def command(
    base: Path, data: Path, output: Path, fields: tuple[str, ...], rewards: str, count: int, as_json: bool, **values: Any
) -> None:
    """Keep what the rewards accept: draw completions of BASE (and an adapter) and write the best ones as rows.

    A second round of `rl sft` on them, from the same adapter, makes the model say more often what it can say already.
    """
    from dataclasses import asdict

    from quantkit.progress import Progress, stop_all
    from quantkit.rl.rewards.loading import rewards_of
    from quantkit.rl.sample import sample

    rows = rows_of(data, fields, ("prompt",))
    functions, weights = rewards_of(rewards)
    found = sample(base, rows, functions, output, count, weights=weights, progress=Progress.terminal(), **values)
    stop_all()
    if as_json:
        emit_json(asdict(found))
        return
    click.echo(
        f"{output}: {found.rows} rows for {found.prompts} of {len(rows)} prompts; {found.ended} of {found.drawn} completions ended, {found.accepted} of them were "
        f"accepted, mean reward {found.mean:.3g}"
    )
