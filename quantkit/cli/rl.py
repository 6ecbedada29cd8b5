"""quantkit rl: adapters trained on top of packed weights."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table, size

PATH = click.Path(path_type=Path)


@click.group(
    "rl",
    help="""Teach and heal: LoRA adapters trained on the very bits of BASE, which never change.

BASE is a GGUF or a folder, quantized or not; its packed weights stay packed.""",
)
def command() -> None:
    """Commands for training."""


def training(together: int, batch: int, rate: float, epochs: float, rows: bool = True) -> Callable[[Any], Any]:
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
        click.option("--steps", type=click.IntRange(min=0), help="Steps of the optimizer (0: by --epochs)."),
        click.option("--epochs", type=float, default=epochs, show_default=True, help="Times through the rows."),
        click.option("--batch", type=click.IntRange(min=1), default=batch, show_default=True, help="Sequences in memory at a time."),
        click.option("--together", type=click.IntRange(min=1), default=together, show_default=True, help="Sequences of one step."),
        click.option("--learning-rate", type=float, default=rate, show_default=True),
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


@command.command("sft")
@training(together=16, batch=4, rate=2e-4, epochs=2.0)
@guarded
def sft(base: Path, data: Path, output: Path, fields: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Supervised priming: a few dozen rows teach a format.

    Rows have prompt and completion, or messages (then the template must mark what the model says). Only the completion
    counts for the loss, and every token of a step alike.
    """
    from quantkit.rl import train
    from quantkit.rl.advice import advice_for_sft
    from quantkit.rl.options import SftOptions

    rows = rows_of(data, fields, ())
    from quantkit.rl.data import require_fields

    require_fields(rows, ("messages",) if "messages" in rows[0] else ("prompt", "completion"), data)
    options, rest = split(values, SftOptions)
    outcome = train.sft(base, rows, output, options, **rest)
    said(outcome, as_json, advice_for_sft(outcome.log))


@command.command("grpo")
@training(together=64, batch=8, rate=2e-5, epochs=1.0)
@click.option("--rewards", required=True, help="rewards.py with the rewards, or library:NAME,NAME.")
@click.option("--generations", type=click.IntRange(min=2), default=8, show_default=True, help="Completions of a prompt: a group.")
@click.option("--completion", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a completion at most.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--beta", type=float, default=0.0, show_default=True, help="Weight of the divergence from where training began.")
@click.option("--epsilon", type=float, default=0.2, show_default=True, help="How far a ratio may fall before it is clipped.")
@click.option("--epsilon-high", type=float, default=0.28, show_default=True, help="How far it may rise.")
@click.option("--loss", type=click.Choice(["grpo", "dr_grpo", "dapo", "bnpo"]), default="dapo", show_default=True)
@click.option("--mask-truncated", is_flag=True, help="Completions that did not end count for nothing.")
@click.option(
    "--engine", type=click.Choice(["torch", "llama"]), default="torch", show_default=True, help="Where completions come from."
)
@click.option(
    "--correction", type=float, default=3.0, show_default=True, help="Most that a token weighs for the engine's mismatch."
)
@guarded
def grpo(base: Path, data: Path, output: Path, fields: tuple[str, ...], rewards: str, as_json: bool, **values: Any) -> None:
    """Group-relative policy optimization: completions of the same prompt compete for rewards.

    Rows have a prompt and whatever the rewards ask for. After priming give its folder as --adapter: the divergence (--beta)
    is then measured to the primed model.
    """
    from quantkit.rl import train
    from quantkit.rl.advice import advice_for_grpo
    from quantkit.rl.options import GrpoOptions
    from quantkit.rl.rewards.loading import rewards_of

    rows = rows_of(data, fields, ("prompt",))
    functions, weights = rewards_of(rewards)
    values["steps"] = 100 if values["steps"] is None else values["steps"]
    options, rest = split({**values, "weights": weights}, GrpoOptions)
    source = sha256(Path(rewards).read_bytes()).hexdigest() if Path(rewards).exists() else rewards
    outcome = train.grpo(base, rows, functions, output, options, source=source, **rest)
    said(outcome, as_json, advice_for_grpo(outcome.log))


@command.command("dpo")
@training(together=16, batch=2, rate=1e-5, epochs=1.0)
@click.option(
    "--loss", type=click.Choice(["dpo", "kto"]), default="dpo", show_default=True, help="Pairs, or single answers with a label."
)
@click.option(
    "--beta", type=float, default=0.1, show_default=True, help="How strongly the model is held to where training began."
)
@guarded
def dpo(base: Path, data: Path, output: Path, fields: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Preferences: which of two answers is the better one, or (--loss kto) whether an answer is good.

    Rows have prompt, chosen and rejected; for kto prompt, completion and label (true or false).
    """
    from quantkit.rl import train
    from quantkit.rl.options import DpoOptions

    rows = rows_of(data, fields, ("prompt", "chosen", "rejected") if values["loss"] == "dpo" else ("prompt", "completion"))
    if values["loss"] == "kto":
        from quantkit.rl.data import require_labels

        require_labels(rows, data)
    options, rest = split(values, DpoOptions)
    said(train.dpo(base, rows, output, options, **rest), as_json, [])


@command.command("qat")
@training(together=16, batch=4, rate=1e-4, epochs=1.0, rows=False)
@click.option("--teacher", required=True, type=PATH, help="The model that was quantized.")
@click.option("--window", type=click.IntRange(min=16), default=256, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--residual/--no-residual", default=True, show_default=True, help="Begin with the largest part of what quantizing took."
)
@guarded
def qat(base: Path, data: tuple[Path, ...], output: Path, as_json: bool, **values: Any) -> None:
    """Heal: an adapter that brings BASE's outputs back to the original's, on plain text.

    A tenth of the text is kept to measure on. `rl export --merge` writes the result as a file of BASE's own types.
    """
    from quantkit.rl.heal import heal
    from quantkit.rl.options import HealOptions

    options, rest = split(values, HealOptions)
    found = heal(base, rest.pop("teacher"), list(data), output, options, **rest)
    said(found.outcome, as_json, [
        f"KL divergence from the original on text kept apart: {found.base:.4g} nats/token before, {found.begun:.4g} as the adapter "
        f"began, {found.healed:.4g} healed"
    ])  # fmt: skip


@command.command("check-rewards")
@click.argument("rewards")
@click.option(
    "--samples",
    nargs=2,
    required=True,
    type=PATH,
    metavar="GOOD BAD",
    help="Completions that deserve a reward, and others: JSON lines.",
)
@click.option("--field", "fields", multiple=True, metavar="NEW=OLD", help="Rename a field of the rows; repeat.")
@click.option("--patience", type=float, default=10.0, show_default=True, help="Seconds that a reward may take for all samples.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def check(rewards: str, samples: tuple[Path, Path], fields: tuple[str, ...], patience: float, as_json: bool) -> None:
    """Do REWARDS (a Python file, or library:NAME) pay for what they should, and for nothing else?

    Rows have prompt, completion and what the rewards ask for. Besides them completions that nobody wants are made of the
    good ones: the answer alone, nonsense that ends in it, always the same answer. Exits with 1 if there are warnings.
    """
    from dataclasses import asdict

    from quantkit.rl.check_rewards import check_rewards
    from quantkit.rl.rewards.loading import rewards_of

    good, bad = (rows_of(path, fields, ("completion",)) for path in samples)
    found = check_rewards(rewards_of(rewards)[0], good, bad, patience)
    if as_json:
        emit_json([asdict(finding) for finding in found])
    else:
        kinds = list(dict.fromkeys(kind for finding in found for kind in finding.degenerate))
        table = [["good samples", *(_number(f.good) for f in found)], ["bad samples", *(_number(f.bad) for f in found)]]
        table += [[kind, *(_number(f.degenerate.get(kind)) for f in found)] for kind in kinds]
        table.append(["pairs ranked right", *("" if f.right is None else f"{f.right:.0%}" for f in found)])
        table.append(["milliseconds each", *(_number(f.milliseconds) for f in found)])
        print_table("Mean reward of", ["completions", *(f.name for f in found)], table)
        for finding in found:
            for warning in finding.warnings:
                click.echo(f"{finding.name} {warning}")
    if any(finding.warnings for finding in found):
        raise SystemExit(1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


@command.command("export")
@click.argument("run", type=PATH)
@click.option("--base", required=True, type=PATH, help="What it was trained on.")
@click.option("-o", "--output", required=True, type=PATH, help="adapter.gguf, or the merged GGUF.")
@click.option("--merge", is_flag=True, help="Write a new quantized GGUF of base plus adapter instead, in the base's own types.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@guarded
def export(run: Path, base: Path, output: Path, merge: bool, force: bool) -> None:
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


@command.command("report")
@click.argument("run", type=PATH)
@click.option("-o", "--output", type=PATH, help="HTML file (default: report.html in RUN).")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@guarded
def report(run: Path, output: Path | None, force: bool) -> None:
    """RUN as one offline HTML file: curves of every reward, groups with their advantages, advice. Also while it runs."""
    from quantkit.rl.report import write_report

    click.echo(f"{write_report(run, output or run / 'report.html', force)}")


@command.command("measure")
@click.argument("base", type=PATH)
@click.option("--data", required=True, type=PATH, help="Rows with prompts: JSON lines that training did not see.")
@click.option("--field", "fields", multiple=True, metavar="NEW=OLD", help="Rename a field of the rows; repeat.")
@click.option("--rewards", required=True, help="A Python file, or library:NAME: what tells right completions from wrong ones.")
@click.option(
    "--right-above", type=float, default=0.0, show_default=True, help="A completion is right if its rewards sum up to more."
)
@click.option("--adapter", type=PATH, help="A run's folder: the rates before and after.")
@click.option("-n", "count", type=click.IntRange(min=1), default=16, show_default=True, help="Completions of each prompt.")
@click.option("-k", "ks", type=click.IntRange(min=1), multiple=True, default=(1, 4, 8), show_default=True, help="Repeat.")
@click.option("--template", type=PATH, help="Chat template (default: the model's).")
@click.option("--system", help="System prompt put in front of every prompt.")
@click.option("--completion", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a completion at most.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def measure(base: Path, data: Path, fields: tuple[str, ...], rewards: str, count: int, as_json: bool, **values: Any) -> None:
    """pass@k and majority@k of BASE, and with an adapter, on the same prompts with the same random numbers."""
    from dataclasses import asdict

    from quantkit.rl.measure import measure as rates_of
    from quantkit.rl.rewards.loading import rewards_of

    rows = rows_of(data, fields, ("prompt",))
    found = rates_of(base, rows, rewards_of(rewards)[0], count, values.pop("ks"), **values)
    if as_json:
        emit_json([asdict(rates) for rates in found])
        return
    ks = list(found[0].pass_at)
    table = [
        [r.name, *(f"{r.pass_at[k]:.1%} ± {r.pass_errors[k]:.1%}" for k in ks), *(f"{r.majority_at[k]:.1%}" for k in ks), f"{r.reward:.3g}"]
        for r in found
    ]  # fmt: skip
    print_table(
        f"{len(rows)} prompts, {count} completions each",
        ["model", *(f"pass@{k}" for k in ks), *(f"majority@{k}" for k in ks), "mean reward"],
        table,
    )
