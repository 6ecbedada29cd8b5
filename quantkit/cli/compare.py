"""quantkit compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table
from quantkit.progress import stop_all

SHOWN = 8  # of the worst tokens


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
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Keep the original's distributions in this file; if it is there, the original is not run.",
)
@click.option("--prompt", "prompts", multiple=True, help="Also let every model go on after this text; repeat.")
@click.option("--breakdown", is_flag=True, help="Also show where the divergence comes from, and the worst tokens.")
@click.option("--append", type=click.Path(path_type=Path), help="Add the rows to this leaderboard (a JSON file).")
@click.option("--work", type=click.Path(path_type=Path), help="Work directory of the original (for its analysis).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    reference: Path, candidates: tuple[Path, ...], text: tuple[Path, ...], runtime: str, device: str, window: int, limit: int | None,
    output: Path | None, cache: Path | None, append: Path | None, work: Path | None, prompts: tuple[str, ...], breakdown: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare and print the table."""
    from dataclasses import asdict

    from quantkit.api import compare
    from quantkit.evaluation.continued import continued
    from quantkit.progress import Progress

    progress = Progress.terminal()
    texts = continued([reference, *candidates], prompts, runtime=runtime, device=device, progress=progress)
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
        cache=cache,
        append=append,
        texts=texts,
        progress=progress,
    )
    stop_all()
    if as_json:
        emit_json({**json.loads(report.to_json()), **({"continued": [asdict(text) for text in texts]} if texts else {})})
        return
    print_report(report)
    if breakdown:
        for candidate in report.candidates:
            print_breakdown(candidate)
    if texts:
        print_texts(texts)
    if append:
        click.echo(f"added to: {append}")
    if output:
        click.echo(f"written: {output}")


def print_texts(texts: list[Any]) -> None:
    """What each model says, and where it first departs from the original."""
    rows = [
        [text.model, "" if text.model == texts[0].model else f"{text.same} of {text.tokens}", f"{text.speed:.1f}", f"{text.seconds:.2f}",
         repr(text.text)]
        for text in texts
    ]  # fmt: skip
    prompts = " | ".join(dict.fromkeys(repr(text.prompt) for text in texts))
    print_table(f"after {prompts}", ["model", "tokens as the original's", "tokens/s", "first token, s", "text"], rows)


def print_breakdown(candidate: Any) -> None:
    """Where the divergence of a candidate comes from, and its worst tokens."""
    kinds = {"text": "text", "position": "position in the window", "frequency": "rank of the token in the text",
             "certainty": "chance of the original's best token", "entropy": "entropy of the original, nats"}  # fmt: skip
    rows = [
        [words if place == 0 else "", g.name, f"{g.tokens:,}", f"{g.mean_kld:.5f} ± {g.error:.5f}", f"{g.share:.1%}", f"{g.top1_agreement:.2%}"]
        for kind, words in kinds.items()
        for place, g in enumerate(getattr(candidate.breakdown, kind))
    ]  # fmt: skip
    heads = ["by", "", "tokens", "mean KLD, nats/token", "of the whole", "top-1 agreement"]
    print_table(f"where {candidate.name} departs", heads, rows, left=2)
    worst = [
        [f"{w.kld:.3f}", w.text, repr(w.context[-40:] + " | " + w.following), f"{w.original_guess!r} {w.original_chance:.0%}",
         f"{w.candidate_guess!r} {w.candidate_chance:.0%}"]
        for w in candidate.breakdown.worst[:SHOWN]
    ]  # fmt: skip
    print_table(
        "its worst tokens", ["KLD, nats", "text", "context | what followed", "the original's guess", "its own"], worst, left=0
    )


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
    worst = max((c.estimate_error / c.divergence.mean_kld for c in report.candidates if c.estimate_error), default=0.0)
    if worst:
        click.echo(f"the original was read from a file; that adds at most {worst:.2%} (standard error) to a mean KLD")
