"""quantkit tune."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from quantkit.cli.output import emit_json, guarded, print_table


@click.command("tune", help="What is fastest on this machine: sizes of GPU programs, or with --compile ways of compiling MODEL.")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--compile", "compiling", is_flag=True, help="Try the ways of torch.compile for MODEL.")
@click.option("-p", "--prompt", default="Once upon a time there was a", show_default=True, help="Text to go on from (--compile).")
@click.option(
    "-n", "--tokens", type=click.IntRange(2), default=32, show_default=True, help="Tokens after it in every run (--compile)."
)
@click.option("--device", help="cpu, cuda, cuda:1. [default: cuda; with --compile cpu]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(model: Path | None, compiling: bool, prompt: str, tokens: int, device: str | None, as_json: bool) -> None:
    """Tune and print the table."""
    from quantkit.errors import PlanError

    if compiling != (model is not None):
        raise PlanError(
            "--compile needs a MODEL" if compiling else "a MODEL is tuned with --compile",
            hint="quantkit tune MODEL --compile, or quantkit tune for the programs of a GPU",
        )
    if model is None:
        _programs(device or "cuda", as_json)
    else:
        _ways(model, prompt, tokens, device or "cpu", as_json)


def _programs(device: str, as_json: bool) -> None:
    from quantkit.evaluation.tune_kernels import tune_kernels
    from quantkit.kernels.settings import settings_path
    from quantkit.progress import Progress, stop_all

    found = tune_kernels(device, Progress.terminal())
    stop_all()
    if as_json:
        emit_json(asdict(found))
        return
    rows = [[("→ " if s.kept else "") + s.setting, str(s.value), s.failed or f"{100 * s.share:.1f} %"] for s in found.steps]
    print_table(f"{found.device}: time of all workloads against the settings before", ["setting", "value", "time"], rows)
    click.echo(f"written: {settings_path(found.device)}")


def _ways(model: Path, prompt: str, tokens: int, device: str, as_json: bool) -> None:
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
