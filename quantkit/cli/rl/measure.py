"""quantkit rl measure: pass@k and majority@k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table
from quantkit.cli.rl.options import drawing, rows_of


@click.command("measure")
@drawing
@click.option("-n", "count", type=click.IntRange(min=1), default=16, show_default=True, help="Completions of each prompt.")
@click.option("-k", "ks", type=click.IntRange(min=1), multiple=True, default=(1, 4, 8), show_default=True, help="Repeat.")
@guarded
def command(base: Path, data: Path, fields: tuple[str, ...], rewards: str, count: int, as_json: bool, **values: Any) -> None:
    """pass@k and majority@k of BASE, and with an adapter, on the same prompts with the same random numbers."""
    from dataclasses import asdict

    from quantkit.rl.measure import measure as rates_of
    from quantkit.rl.rewards.loading import rewards_of

    rows = rows_of(data, fields, ("prompt",))
    functions, weights = rewards_of(rewards)
    found = rates_of(base, rows, functions, count, values.pop("ks"), weights=weights, **values)
    if as_json:
        emit_json([asdict(rates) for rates in found])
        return
    ks = list(found[0].pass_at)
    table = [
        [r.name, *(f"{r.pass_at[k]:.1%} ± {r.pass_errors[k]:.1%}" for k in ks), *(f"{r.majority_at[k]:.1%}" for k in ks), f"{r.reward:.3g}"]
        for r in found
    ]  # fmt: skip
    print_table(
        f"{len(rows)} prompts, {count} completions each",
        ["model", *(f"pass@{k}" for k in ks), *(f"majority@{k}" for k in ks), "mean reward"],
        table,
    )
