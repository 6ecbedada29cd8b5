"""quantkit verify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from quantkit.cli.output import emit_json, guarded


@click.command("verify", help="Check a file or folder against its manifest, and a file against the hashes in its metadata.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(file: Path, as_json: bool) -> None:
    """Print what was checked; exit code 1 if anything differs."""
    from quantkit.quantizer.manifest import verify

    result = verify(file)
    if as_json:
        emit_json({**asdict(result), "ok": result.ok})
    else:
        for line in result.checked:
            click.echo(f"checked: {line}")
        for line in result.unchecked:
            click.echo(f"not checked: {line}")
        for line in result.wrong:
            click.echo(f"WRONG: {line}")
        click.echo(
            f"{file.name}: {'as written' if result.ok else 'NOT as written' if result.wrong else 'nothing could be checked'}"
        )
    if not result.ok:
        raise SystemExit(1)
