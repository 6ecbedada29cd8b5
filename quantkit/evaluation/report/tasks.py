"""Answers to tasks in the HTML report: each model's score beside the original's, with flips and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from quantkit.evaluation.lm_eval.flips import FEW, Changed, changed
from quantkit.evaluation.lm_eval.paired import Paired, PairedPerplexity, paired, paired_perplexities
from quantkit.evaluation.report.charts import HALF, Figure, short_names, size_unit
from quantkit.evaluation.report.svg import Axis, Box, chart, error_bar, frame, mark, place_labels

if TYPE_CHECKING:
    from quantkit.evaluation.lm_eval.results import EvalReport, Score

LISTED = 400  # answers that a report lists at most: about 900 bytes each, and never above 3,500, whatever they hold


@dataclass(frozen=True)
class TaskCell:
    """A model's score (None if it was not asked) and what changed against the first model: answers, or a perplexity.

    listed: documents whose answers flipped, the first few; of a task's main metric only.
    """

    score: Score | None
    change: Paired | None = None
    perplexity: PairedPerplexity | None = None
    listed: Changed | None = None

    @property
    def shown(self) -> str:
        """The score with its standard error."""
        if self.score is None:
            return "–"
        if self.score.unit == "share":
            error = "" if self.score.stderr is None else f" ± {100 * self.score.stderr:.2f}"
            return f"{100 * self.score.value:.2f}{error} %"
        return f"{self.score.value:.4g}" + ("" if self.score.stderr is None else f" ± {self.score.stderr:.2g}")

    @property
    def moved(self) -> str:
        """The difference in points with its bootstrap interval, or the ratio of the perplexities with its own."""
        if self.perplexity is not None:
            return _ratio(self.perplexity)
        if self.change is None:
            return ""
        if self.change.flips is not None and not self.change.flips.lost + self.change.flips.gained:
            return "no answer changed"
        difference = self.change.difference
        ends = difference.interval
        between = "" if ends is None else f" ({100 * ends.low:+.2f} to {100 * ends.high:+.2f})"
        return f"{100 * difference.mean:+.2f}{between}".replace("-", "−")

    @property
    def flipped(self) -> str:
        """How many answers flipped each way, with McNemar's p and that adjusted for all tests of the table."""
        found = None if self.change is None else self.change.flips
        if self.change is None or found is None or not found.lost + found.gained:
            return ""
        return f"{found.lost} lost, {found.gained} gained, p {found.p_value:.3g} (Holm {self.change.p_holm:.3g})"


def _ratio(found: PairedPerplexity) -> str:
    sign, form = ("×", ".4f") if found.is_ratio else ("", "+.4f")
    between = "" if found.interval is None else f" ({found.interval.low:{form}} to {found.interval.high:{form}})"
    return f"{sign}{found.change:{form}}{between}".replace("-", "−")


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task or group: a cell for each model."""

    task: str
    metric: str
    unit: str
    documents: int
    cells: Sequence[TaskCell]


def task_rows(results: EvalReport, members: bool = False) -> list[TaskRow]:
    """A row for each metric of the tasks and groups that were asked for, or of the groups' members."""
    if not results.models:
        return []
    first = results.models[0].results
    names = [n for n in first if n not in results.tasks] if members else [n for n in results.tasks if n in first]
    changes = {(p.task, p.metric, p.model): p for p in paired(results, members)}
    perplexities = {(p.task, p.metric, p.model): p for p in paired_perplexities(results, members)}
    listed = {} if members else {(c.task, c.metric, c.model): c for c in changed_answers(results)}
    out = []
    for name in names:
        for score in first[name].scores:
            cells = []
            for model in results.models:
                found = model.results.get(name)
                own = next((s for s in found.scores if s.name == score.name), None) if found is not None else None
                key = (name, score.name, model.name)
                cells.append(TaskCell(own, changes.get(key), perplexities.get(key), listed.get(key)))
            out.append(TaskRow(name, score.name, score.unit, first[name].documents, cells))
    return out


def changed_answers(results: EvalReport) -> list[Changed]:
    """What flipped, of every candidate and task with a flip, listed while there is room: of many, fewer each."""
    found = [one for one in changed(results) if one.n_lost + one.n_gained]
    few = max(1, min(FEW, LISTED // (2 * len(found)))) if found else 0
    return [replace(one, lost=one.lost[:few], gained=one.gained[:few]) for one in found[: LISTED // 2]]


def accuracy_figure(results: EvalReport) -> Figure | None:
    """Mean over the tasks asked for of the share of right answers, against bytes; None unless two models have both."""
    found = []
    for model in results.models:
        asked = [model.results[name] for name in results.tasks if name in model.results]
        scores = [score for task in asked if (score := task.main) is not None]
        if scores and model.file_bytes:
            mean = sum(s.value for s in scores) / len(scores)
            error = sum((s.stderr or 0) ** 2 for s in scores) ** 0.5 / len(scores)
            found.append((model.file_bytes, mean, error, model is results.models[0], model.name))
    if len(found) < 2:
        return None
    rows = [[name, f"{size:,}", f"{100 * mean:.2f} ± {100 * error:.2f} %"] for size, mean, error, _, name in found]
    return Figure(
        "Accuracy against size", "Mean over the tasks; bars: one standard error. The original is hollow.",
        (_accuracy_picture(found),), ("model", "bytes", "right"), rows,
    )  # fmt: skip


def _accuracy_picture(found: Sequence[tuple[int, float, float, bool, str]]) -> Markup:
    width, height = HALF
    unit, unit_name = size_unit(max(size for size, *_ in found))
    low, high = min(m - e for _, m, e, *_ in found), max(m + e for _, m, e, *_ in found)
    least, most = min(s for s, *_ in found) / unit, max(s for s, *_ in found) / unit
    wide, tall = 0.1 * (most - least) or 1, 0.15 * (high - low) or 0.01
    x = Axis(least - wide, most + wide, 56, width - 12)
    y = Axis(100 * (low - tall), 100 * (high + tall), height - 46, 26)
    parts: list[object] = [*frame(x, y, f"file size, {unit_name}", "right answers, %")]
    labels, bars = [], []
    others = iter(short_names([name for *_, original, name in found if not original]))
    for size, mean, error, original, name in found:
        place, class_ = (x.at(size / unit), y.at(100 * mean)), "stock" if original else "ours"
        low, high = y.at(100 * (mean - error)), y.at(100 * (mean + error))
        parts.append(error_bar(place[0], low, high, class_))
        bars.append(Box(place[0] - 3, high, place[0] + 3, low))
        parts.append(mark(0, *place, f"{name}: {size:,} bytes, {100 * mean:.2f} %", hollow=original, class_=class_))
        labels.append((*place, "original" if original else next(others)))
    parts += place_labels(labels, Box(x.start + 4, y.end - 4, width, y.start - 2), bars)
    return chart(width, height, f"Right answers against file size of {len(found)} models", *parts)
