"""quantkit compare."""

from __future__ import annotations

import json
import shlex
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
@click.option("--limit", type=click.IntRange(16), help="Use at most this many tokens of text, but a window of each.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write an offline HTML report.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Keep the original's distributions in this file; if it is there, the original is not run.",
)
@click.option("--prompt", "prompts", multiple=True, help="Also let every model go on after this text; repeat.")
@click.option("--breakdown", is_flag=True, help="Also show where the divergence comes from, and the worst tokens.")
@click.option("--speed", is_flag=True, help="Also run each model alone: load time, tokens/s, peak memory.")
@click.option(
    "--tasks",
    help="Also ask every model these tasks (names with commas between, or default); as `quantkit eval`, which has more options.",
)
@click.option("--results", type=click.Path(path_type=Path), help="Show these results of `quantkit eval -o` in the report.")
@click.option("--sweep", type=click.Path(path_type=Path), help="Draw the curve of this sweep.json in the report.")
@click.option("--append", type=click.Path(path_type=Path), help="Add the rows to this leaderboard (a JSON file).")
@click.option("--work", type=click.Path(path_type=Path), help="Work directory of the original (for its analysis).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    reference: Path, candidates: tuple[Path, ...], text: tuple[Path, ...], prompts: tuple[str, ...], tasks: str | None,
    results: Path | None, sweep: Path | None, output: Path | None, breakdown: bool, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Compare and print the table."""
    import sys
    from dataclasses import asdict

    from quantkit.api import compare
    from quantkit.evaluation.checks import check_comparison
    from quantkit.evaluation.continued import continued
    from quantkit.planning.sweep import Sweep
    from quantkit.progress import Progress

    progress, ran = Progress.terminal(), {"runtime": values["runtime"], "device": values["device"]}
    if prompts or tasks:
        check_comparison(
            reference, candidates, text, values["runtime"], values["device"], values["limit"], output, values["cache"],
            values["append"], more=True,
        )  # fmt: skip
    curve = Sweep.read(sweep) if sweep is not None else None
    answers = _answers([reference, *candidates], tasks, results, progress=progress, **ran)
    texts = continued([reference, *candidates], prompts, progress=progress, **ran)
    report = compare(
        reference, candidates, text, html=output, texts=texts, results=answers, sweep=curve,
        command=shlex.join(["quantkit", *sys.argv[1:]]), progress=progress, **values,
    )  # fmt: skip
    stop_all()
    if as_json:
        more = {
            "continued": [asdict(text) for text in texts] or None,
            "results": answers and json.loads(answers.to_json(items=False)),
        }
        emit_json({**json.loads(report.to_json()), **{name: value for name, value in more.items() if value is not None}})
        return
    print_report(report)
    if values["speed"]:
        print_footprints(report)
    if breakdown:
        for candidate in report.candidates:
            print_breakdown(candidate)
    if answers is not None:
        from quantkit.cli import eval as tasks_table

        tasks_table.print_report(answers)
        tasks_table.print_changes(answers)
    if texts:
        print_texts(texts)
    if values["append"]:
        click.echo(f"added to: {values['append']}")
    if output:
        click.echo(f"written: {output}")


def _answers(models: list[Path], tasks: str | None, results: Path | None, **options: Any) -> Any:
    """What the models answer to tasks, asked now or read; None without either."""
    from quantkit.cli.eval import quiet_bars, task_names
    from quantkit.errors import PlanError

    if tasks is None:
        from quantkit.evaluation.lm_eval.results import read_results

        return read_results(results) if results is not None else None
    if results is not None:
        raise PlanError("--tasks asks the models, --results reads what they said", hint="give one of the two")
    quiet_bars()
    from quantkit.evaluation.lm_eval.run import Options, evaluate_models
    from quantkit.evaluation.lm_eval.tasks import DEFAULT

    names = DEFAULT if tasks == "default" else task_names(tasks)
    return evaluate_models(models, Options(tasks=names, **options))


def print_footprints(report: Any) -> None:
    """What running each model takes."""
    from quantkit.evaluation.report.sections import FOOTPRINT, footprint_rows

    first = report.reference_footprint or report.candidates[0].footprint
    rows = [[name, *(value.shown for value in values)] for name, values in footprint_rows(report)]
    title = f"alone, {report.runtime}: a prompt of {first.prompt_tokens} tokens, {first.new_tokens} after it, one sequence"
    print_table(title, ["model", *(head for _, head in FOOTPRINT)], rows)


def certain(mean: float, error: float) -> str:
    """A mean with two digits of its standard error."""
    from quantkit.evaluation.report.sections import places

    return f"{mean:.{places(error)}f} ± {error:.{places(error)}f}"


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
        [words if place == 0 else "", g.name, f"{g.tokens:,}", certain(g.mean_kld, g.error), f"{g.share:.1%}", f"{g.top1_agreement:.2%}"]
        for kind, words in kinds.items()
        for place, g in enumerate(getattr(candidate.breakdown, kind))
    ]  # fmt: skip
    heads = ["by", "", "tokens", "mean KLD, nats/token", "of the whole", "top-1 agreement"]
    print_table(f"where {candidate.name} departs", heads, rows, left=2)
    worst = [
        [f"{w.kld:.3g}", w.text, repr(w.context[-40:] + " | " + w.following), f"{w.original_guess!r} {w.original_chance:.0%}",
         f"{w.candidate_guess!r} {w.candidate_chance:.0%}"]
        for w in candidate.breakdown.worst[:SHOWN]
    ]  # fmt: skip
    print_table(
        "its worst tokens", ["KLD, nats", "text", "context | what followed", "the original's guess", "its own"], worst, left=0
    )


def print_report(report: Any) -> None:
    """The headline table."""
    from quantkit.evaluation.compare import worst_estimate

    rows = []
    for c in report.candidates:
        d = c.divergence
        rows.append([
            c.name, f"{c.file_bytes:,}", f"{c.bpw:.3f}", certain(d.mean_kld, d.mean_kld_error), f"{d.median_kld:.3g}",
            f"{d.p99_kld:.3g}", f"{d.p999_kld:.3g}", f"{d.perplexity_ratio:.4f} ± {d.perplexity_ratio_error:.4f}",
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
    worst = worst_estimate(report)
    if worst:
        click.echo(f"the original was read from a file; that adds about {worst:.2%} (standard error) to a mean KLD")
