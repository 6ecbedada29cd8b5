"""quantkit compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table
from quantkit.progress import stop_all


@click.command("compare", help="KL divergence, perplexity and agreement of candidates against the original.")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidates", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--text", multiple=True, type=click.Path(path_type=Path), help="Text to judge on (repeatable; default: a WikiText-2 excerpt)."
)
@click.option(
    "--runtime", type=click.Choice(["torch", "llama"]), default="torch", show_default=True, help="What runs the models."
)
@click.option("--device", default="cpu", show_default=True, help="Where torch runs them: cpu, cuda, cuda:1.")
@click.option(
    "--window", type=click.IntRange(16), default=512, show_default=True, help="Tokens in a window; the second half is scored."
)
@click.option("--limit", type=click.IntRange(16), help="Use at most this many tokens of text.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write an offline HTML report.")
@click.option("--work", type=click.Path(path_type=Path), help="Work directory of the original (for its analysis).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    reference: Path, candidates: tuple[Path, ...], text: tuple[Path, ...], runtime: str, device: str, window: int, limit: int | None,
    output: Path | None, work: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare and print the table."""
    from quantkit.api import compare
    from quantkit.progress import Progress

    progress = Progress.terminal()
    report = compare(
        reference,
        candidates,
        text,
        runtime=runtime,
        window=window,
        limit=limit,
        html=output,
        work=work,
        device=device,
        progress=progress,
    )
    stop_all()
    if as_json:
        emit_json(json.loads(report.to_json()))
        return
    print_report(report)
    if output:
        click.echo(f"written: {output}")


def print_report(report: Any) -> None:
    """The headline table."""
    rows = []
    for c in report.candidates:
        d = c.divergence
        rows.append([
            c.name, f"{c.file_bytes:,}", f"{c.bpw:.3f}", f"{d.mean_kld:.5f} ± {d.mean_kld_error:.5f}", f"{d.median_kld:.5f}",
            f"{d.p99_kld:.4f}", f"{d.p999_kld:.4f}", f"{d.perplexity_ratio:.4f} ± {d.perplexity_ratio_error:.4f}",
            f"{100 * d.top1_agreement:.2f} %", "–" if c.predicted_kld is None else f"{c.predicted_kld:.5f}",
        ])  # fmt: skip
    print_table(
        f"against {report.reference} ({report.reference_bytes:,} bytes) on {', '.join(report.texts)}: {report.tokens:,} tokens "
        f"scored, {report.runtime}; KLD in nats per token",
        [
            "candidate",
            "bytes",
            "bpw",
            "mean KLD",
            "median",
            "99 %",
            "99.9 %",
            "perplexity ratio",
            "top-1 agreement",
            "predicted KLD",
        ],
        rows,
    )
