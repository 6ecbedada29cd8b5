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
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Answers to draw to each question that can be checked, for pass@k and majority@k; 1: the likeliest only.",
)
@click.option("--temperature", type=float, help="Of the answers that are drawn (default 0.7).")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of their random numbers, which every model gets."
)
@click.option("--members", is_flag=True, help="Also show what changed in each task of a group.")
@click.option("--flips", is_flag=True, help="Also list the first questions that each model lost and gained, with the answers.")
@click.option("-o", "--output", type=PATH, help="Write all results, with the answer to every document, as JSON.")
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--work", type=PATH, help="Work directory (default ./NAME.quantkit of each model).")
@click.option("--fresh", is_flag=True, help="Ask everything again, also what an earlier run was told.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@guarded
def command(
    models: tuple[Path, ...], tasks: str | None, served: tuple[str, ...], output: Path | None, force: bool, as_json: bool,
    members: bool, flips: bool, **values: Any,
) -> None:  # fmt: skip
    """Evaluate and print the table."""
    quiet_bars()
    from quantkit.checkpoint.files import refuse_existing, require_folder, write_text
    from quantkit.evaluation.lm_eval.run import Options, Served, evaluate_models
    from quantkit.progress import Progress

    if output is not None:
        require_folder(output)
        refuse_existing(output, force)
    if tasks is not None:
        values["tasks"] = task_names(tasks)
    options = Options(**values, progress=Progress.terminal())
    report = evaluate_models(models, options, [Served.parse(text) for text in served])
    stop_all()
    if output is not None:
        write_text(output, report.to_json())
    if as_json:
        emit_json({**json.loads(report.to_json(items=False)), **_changes(report, members, flips)})
        return
    print_report(report)
    print_changes(report)
    if members:
        print_changes(report, members=True)
    if flips:
        print_flips(report)
    if output is not None:
        click.echo(f"written: {output}")


def quiet_bars() -> None:
    """Before lm-eval is imported: its bars would mix with quantkit's."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def task_names(words: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in words.split(",") if name.strip()]


def _changes(report: Any, members: bool, flips: bool) -> dict[str, Any]:
    """What changed, as it stands in the JSON document."""
    from dataclasses import asdict

    from quantkit.evaluation.lm_eval.flips import changed
    from quantkit.evaluation.lm_eval.paired import paired, paired_perplexities

    def rows(some: bool) -> list[dict[str, Any]]:
        found: list[Any] = [*paired(report, some), *paired_perplexities(report, some)]
        return [asdict(one) for one in found]

    out = {"paired": rows(False)}
    if members:
        out["paired_members"] = rows(True)
    if flips:
        out["flips"] = [asdict(one) for one in changed(report)]
    return out


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
    if report.samples > 1:
        click.echo(
            f"pass@k, majority@k: {report.samples} answers to each question at temperature {report.temperature:g}, seed {report.seed}"
        )
    for model in report.models:
        if model.truncated:
            click.echo(
                f"{model.name}: {model.truncated:,} requests lost tokens from the left, because they exceed its window of {model.window:,}"
            )


def print_changes(report: Any, members: bool = False) -> None:
    """What changed against the reference, document by document, of the tasks or of the groups' tasks."""
    from quantkit.evaluation.lm_eval.paired import paired, paired_perplexities

    where = " in the tasks of groups" if members else ""
    if found := paired(report, members):
        heads = ["task", "metric", "model", "documents", "right → wrong", "wrong → right", "p (McNemar)", "p (Holm)",
                 "difference, points (95 %)"]  # fmt: skip
        tests = sum(one.flips is not None for one in found)
        adjusted = f"; p (Holm) is adjusted for the {tests} tests of this table" * (tests > 1)
        print_table(f"what changed against {found[0].reference}{where}{adjusted}", heads, [_change(one) for one in found], left=3)
    if texts := paired_perplexities(report, members):
        heads = ["task", "metric", "model", "over", "before", "after", "change", "95 %"]
        title = f"perplexities against {texts[0].reference}{where}: × is after ÷ before, ± its paired standard error"
        print_table(title, heads, [_perplexity(one) for one in texts], left=3)


def _change(one: Any) -> list[str]:
    ends = one.difference.interval
    between = "" if ends is None else f" ({100 * ends.low:+.2f} to {100 * ends.high:+.2f})"
    difference = f"{100 * one.difference.mean:+.2f}{between}"
    if one.flips is None:  # several answers to a question: a share of them is right
        return [one.task, one.metric, one.model, f"{one.difference.items:,}", "–", "–", "–", "–", difference]
    return [
        one.task, one.metric, one.model, f"{one.flips.total:,}", f"{one.flips.lost:,}", f"{one.flips.gained:,}",
        f"{one.flips.p_value:.3g}", f"{one.p_holm:.3g}", difference,
    ]  # fmt: skip


def _perplexity(one: Any) -> list[str]:
    sign, form = ("×", ".4f") if one.is_ratio else ("", "+.4f")
    error = "" if one.error is None else f" ± {one.error:.4f}"
    ends = "–" if one.interval is None else f"{one.interval.low:{form}} to {one.interval.high:{form}}"
    return [
        one.task, one.metric, one.model, f"{one.items:,} {one.over if one.items > 1 else one.over.removesuffix('s')}",
        f"{one.before:.4f}", f"{one.after:.4f}", f"{sign}{one.change:{form}}{error}", ends,
    ]  # fmt: skip


def print_flips(report: Any) -> None:
    """The first documents that each model lost and gained: the question, the right answer, and the two models'."""
    from quantkit.evaluation.lm_eval.flips import changed

    for one in changed(report):
        for words, count, documents in (
            ("right → wrong", one.n_lost, one.lost), ("wrong → right", one.n_gained, one.gained),
        ):  # fmt: skip
            if documents:
                shown = f", the first {len(documents)}" if len(documents) < count else ""
                click.echo(f"\n{one.task} ({one.metric}), {one.model} against {one.reference}, {words}: {count:,}{shown}")
            for it in documents:
                click.echo(f"  {it.task} {it.doc}" + (f": {it.question}" if it.question else ""))
                click.echo(f"    right: {it.expected} | {one.reference}: {it.before} | {one.model}: {it.after}")


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
