"""quantkit plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import budget, common, emit_json, guarded, make_options, make_request, print_table, size
from quantkit.cli.speed import make_speed, speed
from quantkit.progress import stop_all


@click.command("plan", help="Spend a byte budget where it matters; plan.json says why for every tensor.")
@click.argument("model", type=click.Path(path_type=Path))
@budget
@speed
@common
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(model: Path, as_json: bool, **values: Any) -> None:
    """Make a plan, write it to the work directory, print it."""
    from quantkit.analysis.run import work_directory
    from quantkit.api import PLAN, plan

    options = make_options(values)
    made = plan(
        model,
        make_request(values),
        values["keep"],
        options,
        only=values["only"],
        floors=values["floors"],
        speed=make_speed(values),
    )
    stop_all()
    if as_json:
        emit_json(json.loads(made.to_json()))
        return
    rows = [[name, entry.format, entry.reason] for name, entry in made.tensors.items() if not entry.reason.startswith("never")]
    print_table(made.name, ["tensor", "format", "why"], rows, left=3)
    describe(made)
    click.echo(f"written: {work_directory(model, values['work']) / PLAN}")


def describe(made: Any) -> None:
    """Size, bits per weight and predicted divergence of a plan, and what the budget was made of."""
    parts = [size(made.file_bytes), f"{made.bpw:.3f} bpw"]
    if "budget_bytes" in made.budget:
        left = made.budget["budget_bytes"] - made.file_bytes
        parts.append(f"{left:,} B below the budget")
    if made.predicted_kld is not None:
        parts.append(f"predicted KLD {made.predicted_kld:.4g} nats/token")
    if made.budget.get("tokens_per_second") is not None:
        parts.append(f"predicted {made.budget['tokens_per_second']:.4g} tokens/s ({made.budget['speed_measured_on']})")
    click.echo(f"{made.name}: " + ", ".join(parts))
    if "kv_cache_bytes" in made.budget:
        budget = made.budget
        click.echo(f"memory at {budget['context']:,} tokens: weights {size(made.file_bytes)}, KV cache ({budget['kv_type']}) "
                   f"{size(budget['kv_cache_bytes'])}, compute and output buffers {size(budget['compute_bytes'])}")  # fmt: skip
