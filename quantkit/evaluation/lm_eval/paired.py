"""What changed between models on the same documents: flips, McNemar's test, differences of shares and of perplexities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from quantkit.evaluation.lm_eval.results import UNITS, EvalReport, Item, ModelScores, is_share
from quantkit.evaluation.statistics import (
    Difference,
    Flips,
    Interval,
    flips,
    holm,
    paired_difference,
    paired_ratio,
    ratio_interval,
)
from quantkit.metrics import exponential

BITS = "bits_per_byte"  # already a logarithm: its change is a difference
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Paired:
    """One model beside the reference, on the documents of a task that both answered. difference: of the shares that are right.

    flips: None where a document has several answers, of which a share is right. p_holm: McNemar's p adjusted for all tests
    that were made together.
    """

    task: str
    metric: str
    model: str
    reference: str
    flips: Flips | None
    difference: Difference
    p_holm: float | None = None


@dataclass(frozen=True)
class PairedPerplexity:
    """One model's perplexity beside the reference's, on the same texts. over: documents, or windows of a single one.

    change: after ÷ before; of bits per byte after − before. error: its standard error, interval: 95 %; both None for one text.
    """

    task: str
    metric: str
    model: str
    reference: str
    items: int
    over: str
    before: float
    after: float
    change: float
    error: float | None
    interval: Interval | None

    @property
    def is_ratio(self) -> bool:
        """Whether ``change`` is a ratio."""
        return self.metric != BITS


def paired(report: EvalReport, members: bool = False) -> list[Paired]:
    """Every model beside the first, for every task and metric whose documents are right or wrong; groups by their documents.

    members: the tasks of the groups instead. The interval is bootstrapped over documents; a document of a group counts once,
    so its shares are of documents, not means over tasks. p-values are adjusted for all tests of the list (``holm``): who looks
    through 17 tasks for one that changed finds one at 5 % by chance more often than not.
    """
    found = [
        one for candidate in report.models[1:] for task in _names(report, members) for one in _compared(report, candidate, task)
    ]
    adjusted = iter(holm([one.flips.p_value for one in found if one.flips is not None]))
    return [one if one.flips is None else replace(one, p_holm=next(adjusted)) for one in found]


def paired_perplexities(report: EvalReport, members: bool = False) -> list[PairedPerplexity]:
    """Every model's perplexities beside the first's, by task; a group has none of its own (members: the tasks of groups).

    Only over documents, or windows of a single one, that have the same weight for both models: perplexities by other
    tokens say nothing about each other.
    """
    return [
        one
        for candidate in report.models[1:]
        for task in _names(report, members)
        for one in _perplexities(report.models[0], candidate, task)
    ]


def verdicts(reference: ModelScores, candidate: ModelScores, task: str, metric: str) -> list[tuple[Key, Item, Item]]:
    """Documents of a task, or of a group's tasks, that both models answered right or wrong, with both answers."""
    before, after = _items(reference, task), _items(candidate, task)
    return [
        (key, item, after[key])
        for key, item in before.items()
        if key in after and _verdict(item, metric) is not None and _verdict(after[key], metric) is not None
    ]


def _names(report: EvalReport, members: bool) -> Sequence[str]:
    """Tasks as they were asked for, or what else has results: the tasks of groups."""
    return [name for name in report.models[0].results if name not in report.tasks] if members else report.tasks


def _compared(report: EvalReport, candidate: ModelScores, task: str) -> Iterator[Paired]:
    reference = report.models[0]
    before, after = _items(reference, task), _items(candidate, task)
    common = [key for key in before if key in after]
    for name in dict.fromkeys(name for key in common for name in before[key].scores):
        if not is_share(name):
            continue
        several = any(name in item.scores and item.samples > 1 for item in before.values())
        pairs = [(_share(before[key], name, several), _share(after[key], name, several)) for key in common]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known:
            first, second = [a for a, _ in known], [b for _, b in known]
            changed = None if several else flips([a == 1 for a in first], [b == 1 for b in second])
            yield Paired(task, name, candidate.name, reference.name, changed, paired_difference(first, second))


def _share(item: Item, metric: str, several: bool) -> float | None:
    """How much of a document's answers is right: 0 or 1 of one answer, anything between of several."""
    value = item.scores.get(metric)
    return value if isinstance(value, float) and (several or value in (0.0, 1.0)) else None


def _verdict(item: Item, metric: str) -> bool | None:
    """Whether an answer is right; None for a metric that is neither 0 nor 1, and for several answers."""
    value = None if item.samples > 1 else _share(item, metric, False)
    return None if value is None else bool(value)


def _perplexities(reference: ModelScores, candidate: ModelScores, task: str) -> Iterator[PairedPerplexity]:
    if task in reference.results and reference.results[task].members:
        return
    before, after = _items(reference, task), _items(candidate, task)
    common = [key for key in before if key in after]
    for name in dict.fromkeys(name for key in common for name in before[key].scores if name in UNITS):
        rows = _weighted([(before[key], after[key]) for key in common], name)
        if rows is None:
            continue
        over = "documents" if len(rows) == len(common) else "windows"
        found = paired_ratio([a for a, _, _ in rows], [b for _, b, _ in rows], [weight for *_, weight in rows])
        yield _perplexity(task, name, (candidate.name, reference.name), over, found)


def _weighted(pairs: Sequence[tuple[Item, Item]], name: str) -> list[tuple[float, float, float]] | None:
    """(log-likelihood before, after, weight) of documents, or of the windows of a single one; None if weights differ."""
    out = []
    for before, after in pairs:
        a, b = before.scores.get(name), after.scores.get(name)
        if not isinstance(a, tuple) or not isinstance(b, tuple) or a[1] != b[1] or not a[1] > 0:
            return None
        out.append((a[0], b[0], a[1]))
    if len(pairs) == 1 and len(windows := pairs[0][0].loglikelihoods) == len(others := pairs[0][1].loglikelihoods) > 1:
        return [(a, b, out[0][2] / len(windows)) for a, b in zip(windows, others, strict=True)]
    return out


def _perplexity(task: str, metric: str, names: tuple[str, str], over: str, found: Difference) -> PairedPerplexity:
    """From mean log-likelihoods: what follows for their exponentials, the error by the slope."""
    if metric == BITS:
        bit = math.log(2)
        ends = found.interval and Interval(-found.interval.high / bit, -found.interval.low / bit, found.interval.level)
        error = None if found.error is None else found.error / bit
        return PairedPerplexity(
            task, metric, *names, found.items, over, -found.before / bit, -found.after / bit, -found.mean / bit, error, ends
        )
    ratio = exponential(-found.mean)
    ends = ratio_interval(found.interval and Interval(-found.interval.high, -found.interval.low, found.interval.level))
    error = None if found.error is None else ratio * found.error
    return PairedPerplexity(
        task, metric, *names, found.items, over, exponential(-found.before), exponential(-found.after), ratio, error, ends
    )


def _items(model: ModelScores, task: str) -> dict[Key, Item]:
    """Documents of a task, or of all tasks of a group, by task, content, and place among documents of the same content."""
    found = model.results.get(task)
    names = () if found is None else (found.members or (task,))
    out: dict[Key, Item] = {}
    for name in names:
        if model.results.get(name) is not None and model.results[name].members:
            out |= _items(model, name)
            continue
        seen: dict[str, int] = {}
        for item in model.results[name].items if name in model.results else ():
            seen[item.hash] = seen.get(item.hash, 0) + 1
            out[name, item.hash, seen[item.hash]] = item
    return out
