"""quantkit rl grpo: completions that compete for rewards."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import guarded
from quantkit.cli.rl.options import rows_of, said, split, training


@click.command("grpo")
@training(together=64, batch=8, rate=2e-5, epochs=None, steps=100)
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
@click.option("--loss", type=click.Choice(["grpo", "dr_grpo", "dapo", "bnpo", "rloo"]), default="dapo", show_default=True)
@click.option("--mask-truncated", is_flag=True, help="Completions that did not end count for nothing.")
@click.option(
    "--engine",
    type=click.Choice(["torch", "llama", "vllm"]),
    default="torch",
    show_default=True,
    help="Where completions come from.",
)
@click.option("--server", metavar="URL", help="Address of the vLLM server, for --engine vllm.")
@click.option(
    "--server-folder", metavar="DIR", help="Folder for adapters that the vLLM server can read, too (default: a temporary one)."
)
@click.option(
    "--correction", type=float, default=3.0, show_default=True, help="Most that a token weighs for the engine's mismatch."
)
@click.option(
    "--cache",
    type=click.Choice(["dynamic", "static"]),
    default="dynamic",
    show_default=True,
    help="Keys and values of --engine torch; static suits compiled GPU code.",
)
@click.option("--tools", help="Tools that completions may call: a Python file, or library:python.")
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True, help="Times that a completion may call them.")
@guarded
def command(
    base: Path, data: Path, output: Path, fields: tuple[str, ...], rewards: str, tools: str | None, as_json: bool, **values: Any
) -> None:
    """Group-relative policy optimization: completions of the same prompt compete for rewards.

    Rows have a prompt and whatever the rewards ask for. After priming give its folder as --adapter: the divergence (--beta)
    is then measured to the primed model.
    """
    from quantkit.rl import train
    from quantkit.rl.advice import advice_for_grpo, advice_of_audits
    from quantkit.rl.options import GrpoOptions
    from quantkit.rl.rewards.loading import rewards_of
    from quantkit.rl.tools import tools_of

    rows = rows_of(data, fields, ("prompt",))
    functions, weights = rewards_of(rewards)
    if values["steps"] is None:
        values["steps"] = 100 if values["epochs"] is None else 0
    options, rest = split({**values, "weights": weights}, GrpoOptions)
    source = " ".join(
        sha256(Path(said).read_bytes()).hexdigest() if Path(said).exists() else said for said in (rewards, tools) if said
    )
    found = tools_of(tools) if tools else ()
    outcome = train.grpo(base, rows, functions, output, options, tools=found, source=source, **rest)
    said(outcome, as_json, [*advice_for_grpo(outcome.log), *advice_of_audits(functions)])
