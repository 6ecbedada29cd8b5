"""quantkit formats."""

from __future__ import annotations

from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table


@click.command("formats", help="Every format: bits, block, zero, multiplier. With a NAME: its bytes, drawn.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(name: str | None, as_json: bool) -> None:
    """Print the registries, or one format."""
    if name is not None and not as_json:
        click.echo(one_format(name))
        return
    blocks, folders = block_rows(), folder_rows()
    if as_json:
        if name is not None:
            one_format(name)  # refuses a name that neither registry has
        emit_json({"formats": [row for row in blocks + folders if name is None or row["name"] == name.upper()]})
        return
    print_table(
        "formats of a GGUF file",
        ["format", "bits per weight", "weights per block", "bytes per block", "zero", "multiplier", "written by", "statistics"],
        [
            [r["name"], f"{r['bpw']:.4g}", str(r["elements"]), str(r["bytes"]), "exact" if r["has_zero"] else "nearest code",
             str(r["multiplier_cost"]), ", ".join(r["methods"]), "needed" if r["needs_importance"] else "used" if r["uses_importance"] else "–"]
            for r in blocks
        ],
    )  # fmt: skip
    print_table(
        "formats of a safetensors folder (bits of a 4096 × 4096 weight)",
        ["format", "bits per weight", "element", "group", "zero point", "multiplier", "loads in"],
        [
            [r["name"], f"{r['bpw']:.4f}", r["element"], str(r["group"] or "row or tensor"), "no" if r["symmetric"] else "yes",
             str(r["multiplier_cost"]), ", ".join(r["loads_in"]) or "–"]
            for r in folders
        ],
    )  # fmt: skip
    click.echo(
        "multiplier: relative size of a hardware multiplier, exponent bits + mantissa bits² (F32 537, BF16 57, FP8 E4M3 13)"
    )


def block_rows() -> list[dict[str, Any]]:
    """Facts of the GGUF formats."""
    from quantkit.encoders import ENCODERS
    from quantkit.formats import formats
    from quantkit.formats.describe import multiplier_cost

    return [
        {"name": f.name, "container": "gguf", "bpw": f.bpw(), "elements": f.elements, "bytes": f.block_bytes(), "symmetric": f.symmetric(),
         "has_zero": f.has_zero, "uses_importance": f.uses_importance, "needs_importance": f.needs_importance, "multiplier_cost": multiplier_cost(f),
         "methods": [name for name, encoder in ENCODERS.items() if encoder.writes(f)], "advice": f.advice}
        for f in formats()
    ]  # fmt: skip


def folder_rows() -> list[dict[str, Any]]:
    """Facts of the safetensors formats."""
    from quantkit.formats.tensors.base import tensor_formats
    from quantkit.formats.tensors.describe import multiplier_cost

    return [
        {"name": f.name, "container": "safetensors", "bpw": f.bpw((4096, 4096)), "element": f.element, "group": f.group,
         "symmetric": f.symmetric, "multiplier_cost": multiplier_cost(f), "loads_in": list(f.loads_in), "source": f.source}
        for f in tensor_formats()
    ]  # fmt: skip


def one_format(name: str) -> str:
    """One format in words, with its bytes drawn. Raises FormatError if neither registry has it."""
    from quantkit.formats import formats, get_format
    from quantkit.formats.describe import draw
    from quantkit.formats.tensors.base import get_tensor_format, tensor_formats
    from quantkit.formats.tensors.describe import draw as draw_tensors

    out = []
    if name.upper() in {f.name for f in formats()} or name.upper() not in {f.name for f in tensor_formats()}:
        fmt = get_format(name)
        out.append(
            f"{fmt.name} (GGUF), {fmt.bpw():.4g} bits per weight: {fmt.block_bytes()} bytes for {fmt.elements} weights\n{fmt.__doc__}\n\n{draw(fmt)}\n\n{fmt.advice}"
        )
    if name.upper() in {f.name for f in tensor_formats()}:
        out.append(draw_tensors(get_tensor_format(name)))
    return "\n\n".join(out)
