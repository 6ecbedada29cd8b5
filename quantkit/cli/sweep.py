"""quantkit sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import common, emit_json, guarded, make_options, print_table
from quantkit.cli.speed import make_speed, speed
from quantkit.progress import stop_all


@click.command("sweep", help="The whole curve of divergence against bytes, with llama-quantize's mixes as points on it.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--from", "start", type=float, default=2.0, show_default=True, metavar="BPW", help="Smallest size, bits per weight."
)
@click.option("--to", "stop", type=float, default=8.0, show_default=True, metavar="BPW", help="Largest size, bits per weight.")
@click.option("--steps", type=click.IntRange(2, 200), default=13, show_default=True, help="Sizes on the curve.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The picture, a PNG (default: sweep.png in the work directory)."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Everything as JSON (default: sweep.json in the work directory; -: print it).",
)
@click.option("--measure", is_flag=True, help="Measure the KL divergence of every plan and mix, not only predict it.")
@click.option(
    "--text",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text to measure on (repeatable; default: what calibration set aside).",
)
@click.option("--limit", type=click.IntRange(32), help="Measure on at most this many tokens (default 4096).")
@click.option("--keep", multiple=True, metavar="REGEX=FORMAT", help="As for quantkit plan.")
@click.option("--floor", "floors", multiple=True, metavar="ROLE=FORMAT", help="As for quantkit plan.")
@click.option("--formats", "only", multiple=True, metavar="PATTERN", help="As for quantkit plan.")
@speed
@common
@guarded
def command(
    model: Path, start: float, stop: float, steps: int, output: Path | None, json_file: Path | None, measure: bool,
    text: tuple[Path, ...], limit: int | None, **values: Any,
) -> None:  # fmt: skip
    """Make the plans, measure them if asked, draw and print."""
    from quantkit.analysis.run import work_directory
    from quantkit.api import SWEEP, SWEEP_PICTURE, sweep

    printed = json_file is not None and str(json_file) == "-"
    options = make_options(values)
    found = sweep(
        model, start, stop, steps, keep=values["keep"], only=values["only"], floors=values["floors"], speed=make_speed(values), measure=measure, text=text,
        limit=limit, picture=output, json=None if printed else json_file, options=options,
    )  # fmt: skip
    stop_all()
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if printed:
        emit_json(json.loads(found.to_json()))
        return
    print_sweep(found)
    work = work_directory(model, values["work"])
    click.echo(f"written: {output or work / SWEEP_PICTURE}, {json_file or work / SWEEP}")


def print_sweep(sweep: Any) -> None:
    """The table, and what it says in a sentence."""
    compared = {c.name: c for c in sweep.comparisons()}
    measured, timed = bool(sweep.measured_on), bool(sweep.speed_measured_on)
    rows = []
    for point in sweep.points:
        against = compared.get(point.name) if point.kind == "stock" else None
        row = [point.name, f"{point.file_bytes:,}", f"{point.bpw:.3f}", f"{point.predicted_kld:.3g}"]
        if measured:
            row.append(f"{point.measured_kld:.3g} ± {point.measured_error:.1g}")
        if timed:
            row.append("–" if point.tokens_per_second is None else f"{point.tokens_per_second:.4g}")
        row.append("" if against is None else _times(against.kld_ratio))
        row.append("" if against is None else _times(against.bytes_ratio))
        rows.append(row)
    where = f", measured on {sweep.measured_tokens:,} tokens of {', '.join(sweep.measured_on)}" if measured else ""
    print_table(
        f"{sweep.model}: KL divergence in nats per token, predicted ({sweep.estimator}){where}",
        ["plan or mix", "bytes", "bpw", "predicted KLD", *(["measured KLD"] if measured else []), *(["tokens/s"] if timed else []),
         "curve's KLD at these bytes", "curve's bytes for this KLD"],
        rows,
    )  # fmt: skip
    if measured:
        click.echo(
            "mixes: measured KLD as llama-quantize encodes them; predicted KLD of the same types by quantkit's best method"
        )
    else:
        click.echo("mixes: KLD of the same types by quantkit's best method, so the curve shows what the choice of types gains; "
                   "what llama-quantize itself leaves is more: --measure")  # fmt: skip
    if timed:
        click.echo(f"tokens/s: predicted for one token at a time with an empty context, {sweep.speed_measured_on}")
    suggest(sweep)


def suggest(sweep: Any) -> None:
    """One sentence: the curve against the mix that most people take, or the nearest one."""
    known = {c.name: c for c in sweep.comparisons() if c.kld_ratio is not None}
    name = "Q4_K_M" if "Q4_K_M" in known else next(iter(known), None)
    if name is None:
        return
    best = known[name]
    what = "KLD" if sweep.measured_on else "predicted KLD"
    saved = f"; its {what} takes {best.bytes_ratio:.2f} × its bytes" if best.bytes_ratio is not None else ""
    click.echo(f"at the bytes of {name}: {best.kld_ratio:.2f} × its {what}{saved}")


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} ×"
