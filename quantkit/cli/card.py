"""quantkit card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import guarded


@click.command(
    "card", help="A model card (README.md for the Hub) of quantized files or folders of one base, from what is known of them."
)
@click.argument("artifacts", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--base-model", metavar="ORG/NAME", help="The original on the Hub (default: what the GGUF's metadata say).")
@click.option(
    "--license", metavar="NAME", help="As the Hub names it, such as apache-2.0 (default: what the GGUF's metadata say)."
)
@click.option("--quantized-by", metavar="NAME", help="Who made it.")
@click.option("--board", type=click.Path(path_type=Path), help="Take its numbers from here, see `quantkit compare --append`.")
@click.option("--report", type=click.Path(path_type=Path), help="Take its numbers from what `quantkit compare --json` printed.")
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A plan.json that a file was written with (repeatable): floors and super weights.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write it (default: README.md beside the files, or in the one folder).",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@guarded
def command(artifacts: tuple[Path, ...], output: Path | None, force: bool, **values: Any) -> None:
    """Write the card."""
    from quantkit.evaluation.card.card import CardOptions, write_card

    path, card = write_card(artifacts, output, CardOptions(**values), force=force)
    for note in card.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"written: {path}")
