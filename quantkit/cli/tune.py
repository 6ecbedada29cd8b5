"""quantkit tune."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantkit.cli.output import emit_json, guarded, print_table


@click.command("tune", help="The fastest way of compiling a packed model on this machine: tried, checked, timed, kept.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--compile", "compiling", is_flag=True, required=True, help="Try the ways of torch.compile.")
@click.option("-p", "--prompt", default="Once upon a time there was a", show_default=True, help="Text to go on from.")
@click.option("-n", "--tokens", type=click.IntRange(2), default=32, show_default=True, help="Tokens after it in every run.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(model: Path, compiling: bool, prompt: str, tokens: int, device: str, as_json: bool) -> None:
    """Tune and print the table."""
    from quantkit.checkpoint import open_checkpoint
    from quantkit.evaluation.tune import tune, tuning_path
    from quantkit.progress import Progress, stop_all

    found = tune(open_checkpoint(model), prompt, tokens, device, progress=Progress.terminal())
    stop_all()
    if as_json:
        emit_json(json.loads(found.to_json()))
        return
    rows = [
        [
            ("→ " if trial.way == found.chosen else "") + trial.way,
            trial.failed or f"{1e3 * trial.prompt_seconds:.1f} ms", "" if trial.failed else f"{1e3 * trial.token_seconds:.2f} ms",
            f"{trial.compile_seconds:.1f} s", "–" if trial.memory is None else f"{trial.memory / 2**20:.0f} MiB", str(trial.recompiles),
        ]
        for trial in found.trials
    ]  # fmt: skip
    print_table(
        f"{found.model} on {found.device}: {found.prompt_tokens} tokens of prompt, {found.tokens} after it; medians of three runs",
        ["way", "prompt", "per token", "compiling", "memory", "recompiles"], rows,
    )  # fmt: skip
    click.echo(
        f"chosen: {found.chosen}; `quantkit generate --compile` uses it. Written: {tuning_path(found.identity, found.device)}"
    )
