"""quantkit rl report: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.output import guarded
from quantkit.cli.rl.options import PATH


@click.command("report")
@click.argument("run", type=PATH)
@click.option("-o", "--output", type=PATH, help="HTML file (default: report.html in RUN).")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@guarded
def command(run: Path, output: Path | None, force: bool) -> None:
    """RUN as one offline HTML file: curves of every reward, groups with their advantages, advice. Also while it runs."""
    from quantkit.rl.report import write_report

    click.echo(f"{write_report(run, output or run / 'report.html', force)}")
