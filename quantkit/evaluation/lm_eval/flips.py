"""Which answers changed: documents that were right and are wrong now, and the other way around, with what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.evaluation.lm_eval.paired import verdicts
from quantkit.evaluation.lm_eval.results import EvalReport, Item, ModelScores

FEW = 8  # documents that are listed of each kind


@dataclass(frozen=True)
class Flipped:
    """One document. task: its own, not the group's. doc: its number there. before, after: what was said, in a few words."""

    task: str
    doc: int
    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Changed:
    """A model beside the reference on a task or group, by its main metric. lost, gained: the first few; all are counted."""

    task: str
    metric: str
    model: str
    reference: str
    n_lost: int
    n_gained: int
    lost: tuple[Flipped, ...]
    gained: tuple[Flipped, ...]


def changed(report: EvalReport, few: int = FEW) -> list[Changed]:
    """Of every model and every task that was asked for, what flipped; tasks whose answers are not right or wrong are left out.

    Of a group, first one document of each task, then a second …
    """
    out = []
    for candidate in report.models[1:]:
        for task in report.tasks:
            found = changed_task(report.models[0], candidate, task, few)
            out += [] if found is None else [found]
    return out


def changed_task(reference: ModelScores, candidate: ModelScores, task: str, few: int = FEW) -> Changed | None:
    """One task of ``changed``; None if it has no documents that are right or wrong."""
    main = reference.results[task].main if task in reference.results else None
    pairs = [] if main is None else verdicts(reference, candidate, task, main.name)
    if main is None or not pairs:
        return None
    lost, gained = (
        [_flipped(key[0], a, b, main.name) for key, a, b in pairs if (a.scores[main.name], b.scores[main.name]) == ends]
        for ends in ((1.0, 0.0), (0.0, 1.0))
    )
    return Changed(
        task, main.name, candidate.name, reference.name, len(lost), len(gained), tuple(_mixed(lost)[:few]), tuple(_mixed(gained)[:few])
    )  # fmt: skip


def _flipped(task: str, before: Item, after: Item, metric: str) -> Flipped:
    return Flipped(task, before.doc, before.question, before.expected, before.said.get(metric, ""), after.said.get(metric, ""))


def _mixed(found: Sequence[Flipped]) -> list[Flipped]:
    """The first of every task, the second of every task …"""
    seen: dict[str, int] = {}
    ranks = []
    for one in found:
        ranks.append(seen.get(one.task, 0))
        seen[one.task] = ranks[-1] + 1
    return [found[place] for place in sorted(range(len(found)), key=ranks.__getitem__)]
