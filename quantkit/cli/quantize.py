"""quantkit quantize."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import budget, common, emit_json, guarded, make_options, make_request, size
from quantkit.cli.speed import make_speed, speed
from quantkit.progress import stop_all


@click.command(
    "quantize",
    help="""Write a quantized GGUF or safetensors folder; runs what is missing, reuses what is there.

MIX is the short form that users of llama-quantize type: quantkit quantize MODEL Q4_K_M.""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("mix", required=False)
@click.option("--plan", help="dynamic (default), standard:Q4_K_M, uniform:Q6_K, uniform:NF4_DQ (a folder) or a plan.json.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output file or folder (default: a name by convention).")
@click.option(
    "--container", type=click.Choice(["gguf", "safetensors"]), help="For formats that both have (MXFP4, NVFP4): GGUF unless told."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Encode K-quants, Q8_0 and FP4 of method ggml on this GPU (cuda)."
)
@click.option("--split-max-size", help="Write parts of at most this size (2GiB), named by convention.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--no-imatrix", is_flag=True, help="Do not weigh errors by activation statistics (standard and uniform plans, plan.json)."
)
@click.option(
    "--adapter", metavar="SIZE", help="Leave this much of the size (64MB) to a low-rank adapter, written beside the file."
)
@budget
@speed
@common
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    model: Path,
    mix: str | None,
    plan: str | None,
    output: Path | None,
    container: str | None,
    split_max_size: str | None,
    force: bool,
    no_imatrix: bool,
    adapter: str | None,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Quantize and print what was written."""
    from quantkit.api import quantize
    from quantkit.errors import PlanError
    from quantkit.planning.budget import parse_size
    from quantkit.quantizer.measured import Measured

    if mix and plan:
        raise PlanError(f"both {mix} and --plan {plan} name a plan", hint="give one of them")
    options = make_options(values)
    path, manifest = quantize(
        model, output, mix or plan or "dynamic", make_request(values), keep=values["keep"], only=values["only"], floors=values["floors"], use_importance=not no_imatrix,
        force=force, split_bytes=parse_size(split_max_size) if split_max_size else None, container=container, speed=make_speed(values), adapter=adapter, device=device, options=options,
    )  # fmt: skip
    stop_all()
    if as_json:
        emit_json({"output": str(path), **asdict(manifest)})
        return
    if manifest.parts:
        click.echo(f"{len(manifest.parts)} parts: {', '.join(manifest.parts)}; the first:")
    for name, entry in manifest.tensors.items():
        if "weighted with ones" in entry["reason"]:
            click.echo(f"note: {name}: {entry['reason'].split('; ', 1)[1]}", err=True)
    for note in manifest.notes:
        click.echo(f"note: {note}", err=True)
    predicted = manifest.plan.get("predicted_kld")
    expected = f", predicted KLD {predicted:.4g} nats/token" if predicted is not None else ""
    if (measured := manifest.plan.get("measured_kld")) is not None:
        expected += f", measured {Measured(**measured)}"
    tokens = manifest.plan.get("budget", {}).get("tokens_per_second")
    expected += f", predicted {tokens:.4g} tokens/s" if tokens is not None else ""
    click.echo(f"{path}: {size(manifest.file_bytes)}, {manifest.bpw:.3f} bpw, {manifest.plan['name']}{expected}, "
               f"encoded in {manifest.seconds:.1f} s, "
               f"{'errors weighted by activation statistics (' + manifest.importance + ')' if manifest.importance else 'no activation statistics'}")  # fmt: skip
