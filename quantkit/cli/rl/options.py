"""What the commands of training share: options, rows, and what they print at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json

PATH = click.Path(path_type=Path)


def training(
    together: int, batch: int, rate: float | None, epochs: float | None, rows: bool = True, steps: int = 0
) -> Callable[[Any], Any]:
    """Options that every method has, with the defaults of one. rows: it learns from rows with prompts, not from text."""
    of_rows = [
        click.option("--data", required=True, type=PATH, help="Rows as JSON lines."),
        click.option("--field", "fields", multiple=True, metavar="NEW=OLD", help="Rename a field of the rows (prompt=question); repeat."),
        click.option("--template", type=PATH, help="Chat template (Jinja), for example with tags for reasoning."),
        click.option("--system", help="System prompt put in front of every prompt."),
        click.option("--max-length", type=click.IntRange(min=8), default=1024, show_default=True, help="Tokens of a sequence at most."),
    ]  # fmt: skip
    of_text = [click.option("--data", required=True, multiple=True, type=PATH, help="Plain text in UTF-8; repeat.")]
    options = [
        click.argument("base", type=PATH), *(of_rows if rows else of_text),
        click.option("-o", "--output", required=True, type=PATH, help="Folder of the run: adapter, log, samples, checkpoints."),
        click.option("--adapter", type=PATH, help="Go on from this adapter, trained on the same BASE."),
        click.option("--steps", type=click.IntRange(min=0), show_default=str(steps) if steps else "by --epochs", help="Steps of the optimizer."),
        click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=epochs, show_default=epochs is not None, help="Times through the rows."),
        click.option("--batch", type=click.IntRange(min=1), default=batch, show_default=True, help="Sequences in memory at a time."),
        click.option("--together", type=click.IntRange(min=1), default=together, show_default=True, help="Sequences of one step."),
        click.option("--learning-rate", type=float, default=rate, show_default=rate or "by what learns"),
        click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter."),
        click.option("--alpha", type=click.IntRange(min=1), help="Its factor times the rank (default: twice the rank)."),
        click.option("--rslora", is_flag=True, help="Divide alpha by the square root of the rank."),
        click.option("--experts", is_flag=True, help="Give every routed expert a pair of its own, too."),
        click.option("--save-memory", is_flag=True, help="Keep only each layer's input while training, on the CPU."),
        click.option("--save-every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between checkpoints."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--log-to", "loggers", multiple=True, metavar="NAME", help="Also log to tensorboard or wandb; repeat."),
        click.option("--resume", is_flag=True, help="Go on after the last checkpoint."),
        click.option("--force", is_flag=True, help="Replace an existing run."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    ]  # fmt: skip

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def drawing(function: Any) -> Any:
    """Options of commands that draw completions and ask rewards about them."""
    options = [
        click.argument("base", type=PATH),
        click.option("--data", required=True, type=PATH, help="Rows with prompts: JSON lines."),
        click.option("--field", "fields", multiple=True, metavar="NEW=OLD", help="Rename a field of the rows; repeat."),
        click.option("--rewards", required=True, help="A Python file, or library:NAME: what tells right completions from wrong ones."),
        click.option("--right-above", type=float, default=0.0, show_default=True, help="A completion is right if its rewards sum up to more."),
        click.option("--adapter", type=PATH, help="A run's folder."),
        click.option("--template", type=PATH, help="Chat template (default: the adapter's or the model's)."),
        click.option("--system", help="System prompt put in front of every prompt."),
        click.option("--completion", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a completion at most."),
        click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def split(values: dict[str, Any], kind: Any) -> tuple[Any, dict[str, Any]]:
    """Options of a method from the command line's, and the rest."""
    from dataclasses import fields

    from quantkit.rl.options import LoraOptions

    lora = LoraOptions(values.pop("rank"), values.pop("alpha"), rslora=values.pop("rslora"), experts=values.pop("experts"))
    names = {field.name for field in fields(kind)}
    given = {name: values.pop(name) for name in list(values) if name in names}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}
    return kind(**given, lora=lora), values


def rows_of(data: Path, fields: tuple[str, ...], needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows with fields renamed. Raises RewardError."""
    from quantkit.errors import RewardError
    from quantkit.rl.data import read_rows, require_fields

    for field in fields:
        if field.count("=") != 1:
            raise RewardError(f"--field {field} is not NEW=OLD", hint="for example --field prompt=question")
    rows = read_rows(data, dict(tuple(field.split("=")) for field in fields))  # type: ignore[misc]
    require_fields(rows, needed, data)
    return rows


def said(outcome: Any, as_json: bool, advice: list[str]) -> None:
    """Print what was trained."""
    if as_json:
        from dataclasses import asdict

        emit_json({**asdict(outcome), "folder": str(outcome.folder), "advice": advice})
        return
    click.echo(f"{outcome.folder}: {outcome.steps} steps in {outcome.seconds:.0f} s on {outcome.base}, whose bytes are unchanged")
    for line in advice:
        click.echo(line)
