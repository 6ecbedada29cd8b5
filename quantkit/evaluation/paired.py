"""What changed between models on the same documents: flips, McNemar's test, and the interval of the difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.evaluation.lm_eval_results import SHARES, EvalReport, Item, ModelScores
from quantkit.evaluation.statistics import Difference, Flips, flips, paired_difference


@dataclass(frozen=True)
class Paired:
    """One model beside the reference, on the documents of a task that both answered. difference: of the shares that are right."""

    task: str
    metric: str
    model: str
    reference: str
    flips: Flips
    difference: Difference


def paired(report: EvalReport) -> list[Paired]:
    """Every model beside the first, for every task and metric whose documents are right or wrong; groups by their members.

    The interval is bootstrapped over documents; a document of a group counts once, so its shares are of documents, not
    means over tasks.
    """
    out: list[Paired] = []
    for candidate in report.models[1:]:
        for task in report.tasks:
            out += _compared(report.models[0], candidate, task)
    return out


def _compared(reference: ModelScores, candidate: ModelScores, task: str) -> Iterator[Paired]:
    before, after = _items(reference, task), _items(candidate, task)
    common = [key for key in before if key in after]
    names = dict.fromkeys(name for key in common for name in before[key].scores)
    for name in names:
        if name.partition(",")[0] not in SHARES:
            continue
        pairs = [(_verdict(before[key], name), _verdict(after[key], name)) for key in common]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known:
            right = [[a for a, _ in known], [b for _, b in known]]
            difference = paired_difference(*([float(value) for value in some] for some in right))
            yield Paired(task, name, candidate.name, reference.name, flips(*right), difference)


def _verdict(item: Item, metric: str) -> bool | None:
    """Whether an answer is right; None for a metric that is neither 0 nor 1."""
    value = item.scores.get(metric)
    return bool(value) if isinstance(value, float) and value in (0.0, 1.0) else None


def _items(model: ModelScores, task: str) -> dict[tuple[str, str, int], Item]:
    """Documents of a task, or of all tasks of a group, by task, content, and place among documents of the same content."""
    found = model.results.get(task)
    names = () if found is None else (found.members or (task,))
    out: dict[tuple[str, str, int], Item] = {}
    for name in names:
        if model.results.get(name) is not None and model.results[name].members:
            out |= _items(model, name)
            continue
        seen: dict[str, int] = {}
        for item in model.results[name].items if name in model.results else ():
            seen[item.hash] = seen.get(item.hash, 0) + 1
            out[name, item.hash, seen[item.hash]] = item
    return out
