"""quantkit rl check-rewards: do rewards pay for what they should?"""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.output import emit_json, guarded, print_table
from quantkit.cli.rl.options import PATH, rows_of


@click.command("check-rewards")
@click.argument("rewards")
@click.option(
    "--samples",
    nargs=2,
    required=True,
    type=PATH,
    metavar="GOOD BAD",
    help="Completions that deserve a reward, and others: JSON lines.",
)
@click.option("--field", "fields", multiple=True, metavar="NEW=OLD", help="Rename a field of the rows; repeat.")
@click.option("--patience", type=float, default=10.0, show_default=True, help="Seconds that a reward may take for all samples.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(rewards: str, samples: tuple[Path, Path], fields: tuple[str, ...], patience: float, as_json: bool) -> None:
    """Do REWARDS (a Python file, or library:NAME) pay for what they should, and for nothing else?

    Rows have prompt, completion and what the rewards ask for. Besides them completions that nobody wants are made of the
    good ones: the answer alone, nonsense that ends in it, always the same answer. Exits with 1 if there are warnings.
    """
    from dataclasses import asdict

    from quantkit.rl.check_rewards import check_rewards
    from quantkit.rl.rewards.loading import rewards_of

    good, bad = (rows_of(path, fields, ("completion",)) for path in samples)
    found = check_rewards(rewards_of(rewards)[0], good, bad, patience)
    if as_json:
        emit_json([asdict(finding) for finding in found])
    else:
        kinds = list(dict.fromkeys(kind for finding in found for kind in finding.degenerate))
        table = [["good samples", *(_number(f.good) for f in found)], ["bad samples", *(_number(f.bad) for f in found)]]
        table += [[kind, *(_number(f.degenerate.get(kind)) for f in found)] for kind in kinds]
        table.append(["pairs ranked right", *("" if f.right is None else f"{f.right:.0%}" for f in found)])
        table.append(["milliseconds each", *(_number(f.milliseconds) for f in found)])
        print_table("Mean reward of", ["completions", *(f.name for f in found)], table)
        for finding in found:
            for warning in finding.warnings:
                click.echo(f"{finding.name} {warning}")
    if any(finding.warnings for finding in found):
        raise SystemExit(1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
