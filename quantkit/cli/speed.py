"""quantkit speed, and the options of commands that ask for a speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table
from quantkit.progress import stop_all


@click.command("speed", help="How fast this machine decodes each format: llama.cpp's product of a matrix and one vector.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the run (default: all cores).")
@click.option("--again", is_flag=True, help="Measure anew, although rates of this machine are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, which --rates reads.")
@guarded
def command(threads: int | None, again: bool, as_json: bool) -> None:
    """Measure, or read what was measured before, and print."""
    from quantkit.formats import get_format
    from quantkit.planning.rates import rates_of_this_machine
    from quantkit.progress import Progress

    rates = rates_of_this_machine(threads, Progress.terminal(), again)
    stop_all()
    warn_if_busy(rates)
    if as_json:
        emit_json(json.loads(rates.to_json()))
        return
    rows = [
        [name, f"{get_format(name).bpw():.4g}", f"{rate / 1e9:.2f}", f"{rate * get_format(name).bpw() / 8e9:.2f}",
         f"{rates.cached[name] / 1e9:.2f}" if name in rates.cached else "–"]
        for name, rate in rates.weights_per_second.items()
    ]  # fmt: skip
    print_table(
        f"{rates.machine}: {rates.describe()}, one vector at a time",
        ["format", "bits per weight", "from memory, Gweights/s", "GB/s", "from the cache, Gweights/s"],
        rows,
    )
    click.echo(f"models of up to {rates.cache_bytes / 2**20:.0f} MiB count as cached; a node of the graph takes "
               f"{1e6 * rates.seconds_per_node:.2f} µs beside its weights")  # fmt: skip


def warn_if_busy(rates: Any) -> None:
    """Say that the numbers are too low if other programs ran meanwhile."""
    from quantkit.planning.speed import QUIET

    if rates.cpu_share < QUIET:
        click.echo(
            f"note: the machine was busy (the threads had {100 * rates.cpu_share:.0f} % of their cores): these rates are too low and "
            "are not kept; measure again when it is quiet, or with fewer --threads",
            err=True,
        )


def speed(function: Callable[..., None]) -> Callable[..., None]:
    """The second constraint."""
    options = [
        click.option("--min-tokens-per-second", type=float, help="Decode at least so fast on this machine's CPU, by measured rates."),
        click.option("--rates", type=click.Path(path_type=Path), help="Rates of another machine: what `quantkit speed --json` printed there."),
        click.option("--threads", type=click.IntRange(1), help="Threads of the run whose speed is predicted (default: all cores)."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def make_speed(values: dict[str, Any]) -> Any:
    """SpeedRequest of the API from the options of the command line, None if no speed was asked for."""
    from quantkit.planning.speed import SpeedRequest

    least, rates, threads = values["min_tokens_per_second"], values["rates"], values["threads"]
    return SpeedRequest(least, rates, threads) if (least, rates, threads) != (None, None, None) else None
