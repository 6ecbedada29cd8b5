"""quantkit eval."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from quantkit.cli.output import emit_json, guarded, print_table
from quantkit.progress import stop_all

PATH = click.Path(path_type=Path)


@click.command("eval", help="Tasks of lm-eval on any number of models, side by side; the first is the reference.")
@click.argument("models", type=PATH, nargs=-1, required=True)
@click.option(
    "--tasks", help="Names with commas between, lm-eval's too (default: ARC easy and challenge, PIQA and BLiMP, without a hub)."
)
@click.option("--served", multiple=True, metavar="URL=MODEL", help="A model behind an endpoint of OpenAI's kind (repeatable).")
@click.option("--limit", type=click.IntRange(1), help="At most this many documents of each task, windows of a text.")
@click.option("--num-fewshot", "shots", type=click.IntRange(0), help="Examples before each question (default: the task's).")
@click.option("--chat", is_flag=True, help="Put questions into the models' chat templates.")
@click.option("--data", help="Folder of the offline tasks' data, or sample (default: $QUANTKIT_DATA).")
@click.option(
    "--runtime", type=click.Choice(["torch", "llama"]), default="torch", show_default=True, help="What runs the models."
)
@click.option("--device", default="cpu", show_default=True, help="Where torch runs them: cpu, cuda, cuda:1.")
@click.option("--window", type=click.IntRange(16), help="Tokens of context (default: the model's, with llama at most 2048).")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Sequences in a pass.")
@click.option("-o", "--output", type=PATH, help="Write all results, with the answer to every document, as JSON.")
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--work", type=PATH, help="Work directory (default ./NAME.quantkit of each model).")
@click.option("--fresh", is_flag=True, help="Ask everything again, also what an earlier run was told.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    models: tuple[Path, ...], tasks: str | None, served: tuple[str, ...], output: Path | None, force: bool, as_json: bool, **values: Any
) -> None:  # fmt: skip
    """Evaluate and print the table."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before lm-eval is imported: its bars would mix with quantkit's
    from quantkit.checkpoint.files import refuse_existing, require_folder, write_text
    from quantkit.evaluation.lm_eval_run import Options, Served, evaluate_models
    from quantkit.evaluation.paired import paired
    from quantkit.progress import Progress

    if output is not None:
        require_folder(output)
        refuse_existing(output, force)
    if tasks is not None:
        values["tasks"] = [name.strip() for name in tasks.split(",") if name.strip()]
    options = Options(**values, progress=Progress.terminal())
    report = evaluate_models(models, options, [Served.parse(text) for text in served])
    stop_all()
    if output is not None:
        write_text(output, report.to_json())
    if as_json:
        from dataclasses import asdict

        emit_json({**json.loads(report.to_json(items=False)), "paired": [asdict(one) for one in paired(report)]})
        return
    print_report(report)
    print_changes(paired(report))
    if output is not None:
        click.echo(f"written: {output}")


def print_report(report: Any) -> None:
    """A row for each task and metric, a column for each model."""
    rows = []
    for task in report.tasks:
        known = [model.results.get(task) for model in report.models]
        for score in next(found.scores for found in known if found is not None):
            cells = [_cell(found, score.name, known[0]) for found in known]
            rows.append([task, f"{score.name} {'↑' if score.higher_is_better else '↓'}", _unit(score.unit), *cells])
    documents = {task: model.results[task] for model in report.models for task in report.tasks if task in model.results}
    counts = ", ".join(
        f"{task} {found.documents:,}{f' ({found.shots}-shot)' * bool(found.shots)}" for task, found in documents.items()
    )
    print_table(f"documents: {counts}", ["task", "metric", "unit", *(model.name for model in report.models)], rows, left=3)
    for model in report.models:
        if model.truncated:
            click.echo(
                f"{model.name}: {model.truncated:,} requests lost tokens from the left, because they exceed its window of {model.window:,}"
            )


def print_changes(found: list[Any]) -> None:
    """What changed against the reference, document by document."""
    rows = []
    for one in found:
        low_high = one.difference.interval
        between = "" if low_high is None else f" ({100 * low_high.low:+.2f} to {100 * low_high.high:+.2f})"
        rows.append([
            one.task, one.metric, one.model, f"{one.flips.total:,}", f"{one.flips.lost:,}", f"{one.flips.gained:,}", f"{one.flips.p_value:.3g}",
            f"{100 * one.difference.mean:+.2f}{between}",
        ])  # fmt: skip
    if rows:
        heads = [
            "task",
            "metric",
            "model",
            "documents",
            "right → wrong",
            "wrong → right",
            "p (McNemar)",
            "difference, points (95 %)",
        ]
        print_table(f"what changed against {found[0].reference}", heads, rows, left=3)


def _cell(found: Any, name: str, reference: Any) -> str:
    """``31.20 ± 0.95 (-1.40)``, in percent for shares, with the difference to the reference; a dash where nothing was asked."""
    score, first = _score(found, name), _score(reference, name)
    if score is None:
        return "–"
    factor, digits = (100, 2) if score.unit == "share" else (1, 4)
    error = "" if score.stderr is None else f" ± {factor * score.stderr:.{digits}f}"
    change = "" if found is reference or first is None else f" ({factor * (score.value - first.value):+.{digits}f})"
    return f"{factor * score.value:.{digits}f}{error}{change}"


def _score(found: Any, name: str) -> Any:
    return None if found is None else next((score for score in found.scores if score.name == name), None)


def _unit(unit: str) -> str:
    return "%" if unit == "share" else unit
