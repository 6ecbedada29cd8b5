"""quantkit repair."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import common, emit_json, guarded, make_options, size
from quantkit.progress import stop_all


@click.command(
    "repair",
    help="""Write a low-rank adapter that makes up for what quantizing took from MODEL.

QUANTIZED is a GGUF of the same model, of quantkit or any other tool. llama.cpp adds the adapter with --lora; `quantkit compare` takes QUANTIZED+ADAPTER.""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("quantized", type=click.Path(path_type=Path))
@click.option("--size", "most", required=True, metavar="SIZE", help="Bytes of the adapter at most (64MB).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output file (default: QUANTIZED-adapter.gguf).")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(model: Path, quantized: Path, most: str, output: Path | None, force: bool, as_json: bool, **values: Any) -> None:
    """Repair and print what was written."""
    from quantkit.api import repair

    found = repair(model, quantized, most, output, force=force, options=make_options(values))
    stop_all()
    if as_json:
        emit_json({**asdict(found), "path": str(found.path)})
        return
    ranks = sorted(found.ranks.values())
    click.echo(
        f"{found.path}: {size(found.file_bytes)}, ranks {ranks[0]} to {ranks[-1]} for {len(ranks)} tensors, "
        f"should save {found.saved:.3g} nats/token"
    )
