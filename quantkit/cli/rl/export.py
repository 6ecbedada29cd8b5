"""quantkit rl export: adapter.gguf, or a merged file."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.output import guarded, size
from quantkit.cli.rl.options import PATH


@click.command("export")
@click.argument("run", type=PATH)
@click.option("--base", required=True, type=PATH, help="What it was trained on.")
@click.option("-o", "--output", required=True, type=PATH, help="adapter.gguf, or the merged GGUF.")
@click.option("--merge", is_flag=True, help="Write a new quantized GGUF of base plus adapter instead, in the base's own types.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@guarded
def command(run: Path, base: Path, output: Path, merge: bool, force: bool) -> None:
    """Write RUN's adapter for llama.cpp (--lora), or merge it into a new file."""
    from quantkit.rl.base import open_base
    from quantkit.rl.export import export_adapter, merge_divergence
    from quantkit.rl.export import merge as merge_into

    opened = open_base(base)
    if merge:
        plan = merge_into(run, opened, output, force)
        changed = sum(entry.reason == "base plus adapter" for entry in plan.tensors.values())
        click.echo(f"{output}: {size(output.stat().st_size)}, {changed} tensors changed, all others are the base's very bytes")
        mean, error = merge_divergence(run, opened, output)
        click.echo(
            f"rounding the sum costs {mean:.4g} ± {error:.2g} nats/token against base plus adapter (KL divergence, WikiText-2 excerpt)"
        )
        return
    lora = export_adapter(run, opened, output, force)
    click.echo(f"{output}: {size(output.stat().st_size)}, {len(lora.pairs)} pairs of rank {lora.rank}, for {opened.name}")
