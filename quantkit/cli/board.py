"""quantkit board."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantkit.cli.output import emit_json, guarded, print_table


@click.command("board", help="The rows that `quantkit compare --append` kept, like ranked with like.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print tables in Markdown, with date, version and machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(file: Path, markdown: bool, as_json: bool) -> None:
    """Print one table for each original, text, runtime and device."""
    from quantkit.errors import PlanError
    from quantkit.evaluation.board import read_board, render, to_markdown

    if markdown and as_json:
        raise PlanError("--markdown and --json exclude each other", hint="give one of them")
    board = read_board(file)
    if as_json:
        emit_json(json.loads(board.to_json()))
        return
    tables = render(board, origin=markdown)
    if markdown:
        click.echo("\n\n".join(map(to_markdown, tables)))
        return
    for table in tables:
        print_table(table.title, list(table.columns), [list(row) for row in table.rows])
