"""quantkit formats."""

from __future__ import annotations

from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table

# How llama.cpp's CPU kernels treat a type: measured classes, not promises.
SPEED = {"F32": "slow (4 bytes a weight)", "F16": "medium", "BF16": "medium", "Q8_0": "fast"}


@click.command("formats", help="Every format: bits, block, container, speed class.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(as_json: bool) -> None:
    """Print the registry."""
    from quantkit.encoders import ENCODERS
    from quantkit.formats import formats

    rows: list[dict[str, Any]] = []
    for fmt in formats():
        methods = [name for name, encoder in ENCODERS.items() if fmt.name in encoder.serves]
        speed = SPEED.get(fmt.name, "fast (super-blocks)" if fmt.elements == 256 else "fast")
        rows.append({"name": fmt.name, "bpw": fmt.bpw(), "elements": fmt.elements, "bytes": fmt.block_bytes(),
                     "symmetric": fmt.symmetric, "has_zero": fmt.symmetric if fmt.has_zero is None else fmt.has_zero, "containers": list(fmt.containers), "methods": methods, "speed": speed})  # fmt: skip
    if as_json:
        emit_json({"formats": rows})
        return
    print_table(
        "formats",
        ["format", "bits per weight", "weights per block", "bytes per block", "zero", "container", "written by", "decode speed"],
        [
            [r["name"], f"{r['bpw']:.4g}", str(r["elements"]), str(r["bytes"]), "exact" if r["has_zero"] else "with minimum" if not r["symmetric"] else "nearest code",
             ", ".join(r["containers"]), ", ".join(r["methods"]), r["speed"]]
            for r in rows
        ],
    )  # fmt: skip
