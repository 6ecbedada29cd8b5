"""quantkit inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table, size


@click.command("inspect", help="What is in a model: architecture, tensors, roles, shapes, bytes, and which formats fit.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--tensor", help="Show one tensor, and its bytes in every format that fits.")
@click.option("--pre-tokenizer", help="llama.cpp's name of the pre-tokenizer where it cannot be recognized.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(model: Path, tensor: str | None, pre_tokenizer: str | None, as_json: bool) -> None:
    """Print facts about a checkpoint; for quantkit's own files also why each tensor is what it is."""
    from quantkit.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, pre_tokenizer=pre_tokenizer)
    why = _reasons(checkpoint)
    infos = [checkpoint.info(tensor)] if tensor else list(checkpoint.tensors.values())
    rows = [_row(checkpoint, info, why.get(info.name)) for info in infos]
    document = {
        "model": model.name, "architecture": checkpoint.family.arch, "layers": checkpoint.n_layers,
        "weights": checkpoint.n_weights, "tied_head": checkpoint.tied, "tensors": rows,
    }  # fmt: skip
    if as_json:
        emit_json(document)
        return
    total = sum(checkpoint.nbytes(name) for name in checkpoint.tensors)
    click.echo(f"{checkpoint.path.name}: {checkpoint.family.arch}, {checkpoint.n_layers} layers, {checkpoint.n_weights:,} weights, "
               f"{'tied head' if checkpoint.tied else 'own head'}, {size(total)} of tensor data")  # fmt: skip
    if tensor:
        for fmt, count in rows[0]["bytes_by_format"].items():
            click.echo(f"  as {fmt}: {size(count)}")
    columns = ["tensor", "role", "type", "shape", "bytes", "formats that fit a row"] + (["why"] if why else [])
    print_table("", columns, [_cells(r, bool(why)) for r in rows], left=4)


def _row(checkpoint: Any, info: Any, why: str | None) -> dict[str, Any]:
    from quantkit.formats import formats, get_format

    fits = [f.name for f in formats() if f.is_quantized() and f.fits(info.columns)] if info.quantizable else []
    return {
        "name": info.name, "role": info.role.value, "layer": info.layer, "type": info.dtype, "shape": list(info.shape),
        "bytes": checkpoint.nbytes(info.name), "fits": fits, "why": why,
        "bytes_by_format": {name: get_format(name).row_bytes(info.columns) * info.rows for name in fits},
    }  # fmt: skip


def _cells(row: dict[str, Any], with_why: bool) -> list[str]:
    fits = "not quantized" if not row["fits"] else "all" if "Q4_K" in row["fits"] else ", ".join(row["fits"])
    cells = [row["name"], row["role"], row["type"], " × ".join(map(str, row["shape"])), f"{row['bytes']:,}", fits]
    return [*cells, row["why"] or ""] if with_why else cells


def _reasons(checkpoint: Any) -> dict[str, str]:
    """Why each tensor of one of our files is what it is, from its manifest."""
    from quantkit.quantizer.manifest import Manifest, manifest_path

    path = manifest_path(checkpoint.path)
    if not path.exists():
        return {}
    reasons = {name: entry.get("reason", "") for name, entry in Manifest.read(path).tensors.items()}
    if not checkpoint.path.is_dir():
        return reasons
    names = {name: checkpoint.family.to_gguf(name) for name in reasons}  # a folder has Hugging Face's names
    return {target[0]: reasons[name] for name, target in names.items() if target}
