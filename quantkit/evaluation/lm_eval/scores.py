"""From lm-eval's results to ours: the scores of a task with their errors, and its documents with the answers to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.evaluation.lm_eval.results import SHARES, UNITS, Item, Score, TaskScores, Value
from quantkit.evaluation.lm_eval.samples import Draws, judge, mean_scores, verdict_of, with_groups
from quantkit.evaluation.lm_eval.words import words_of


def all_scores(results: dict[str, Any], tasks: Mapping[str, Any], draws: Draws | None = None) -> dict[str, TaskScores]:
    """Every task and group out of what lm-eval's ``evaluate`` gives. tasks: its objects by name. draws: if several answers
    were drawn.
    """
    sampled = [name for name, task in tasks.items() if draws is not None and verdict_of(task) is not None]
    found = {
        name: task_scores(name, results, _Asked(tasks.get(name), draws if name in sampled else None))
        for name in results["results"]
    }
    return with_groups(found, sampled) if sampled else found


@dataclass(frozen=True)
class _Asked:
    """A task of lm-eval (None for a group), and how its answers were drawn."""

    task: Any = None
    draws: Draws | None = None


def task_scores(name: str, results: dict[str, Any], asked: _Asked) -> TaskScores:
    """One task or group."""
    found = results["results"][name]
    items = _items(results["samples"][name], asked) if name in results.get("samples", {}) else ()
    scores = mean_scores(items) if asked.draws is not None else tuple(_scores(name, results, items))
    return TaskScores(
        name, int(results["n-shot"].get(name) or 0), str(results["versions"].get(name)), int(found.get("sample_len", len(items))),
        scores, items, tuple(results.get("group_subtasks", {}).get(name, ())),
    )  # fmt: skip


def _scores(name: str, results: dict[str, Any], items: Sequence[Item]) -> Iterator[Score]:
    """Metrics as lm-eval has them."""
    found = results["results"][name]
    for key, value in found.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if kind == "none" else key
        stderr = found.get(f"{metric}_stderr,{kind}")
        error = float(stderr) if isinstance(stderr, float | int) else _pooled_error(metric, label, float(value), items)
        higher = bool(results["higher_is_better"].get(name, {}).get(metric, True))
        yield Score(label, float(value), error, "share" if metric in SHARES else UNITS.get(metric, ""), higher)


def _items(samples: Sequence[dict[str, Any]], asked: _Asked) -> tuple[Item, ...]:
    """lm-eval logs a document once for each filter; here it is one item."""
    out: dict[int, Item] = {}
    for sample in samples:
        found, known = _item(sample, asked), out.get(sample["doc_id"])
        if known is not None:
            found = replace(
                found, scores=known.scores | found.scores, said=known.said | found.said, right=known.right | found.right
            )
        out[sample["doc_id"]] = found
    return tuple(out[doc] for doc in sorted(out))


def _item(sample: dict[str, Any], asked: _Asked) -> Item:
    """A document as one filter has it."""
    suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
    if asked.draws is not None:
        judged = judge(asked.task, sample, suffix, asked.draws)
        item = replace(_answer(sample, dict(judged.scores)), samples=asked.draws.samples, right=judged.right)
    else:
        values = {f"{metric}{suffix}": _value(metric, sample[metric]) for metric in sample["metrics"]}
        item = _answer(sample, {name: value for name, value in values.items() if value is not None})
    words = words_of(asked.task, sample, suffix)
    return replace(item, question=words.question, expected=words.expected, said=words.said)


def _value(metric: str, found: Any) -> Value | None:
    """None for what is no number of a single document, such as the pair of classes behind a correlation."""
    if metric in UNITS and isinstance(found, tuple | list):
        return float(found[0]), float(found[1])
    return float(found) if isinstance(found, bool | int | float) else None


def _answer(sample: dict[str, Any], scores: dict[str, Value]) -> Item:
    target = sample["target"] if isinstance(sample["target"], int) else str(sample["target"])
    first = sample["resps"][0][0]
    named = {"doc": sample["doc_id"], "hash": sample["doc_hash"][:16], "scores": scores}
    if isinstance(first, str):
        return Item(**named, target=target, text=first)
    if isinstance(first, list):  # windows of a text
        return Item(**named, loglikelihoods=tuple(score for score, _ in first))
    if isinstance(first, float):  # a whole text
        return Item(**named, loglikelihoods=(first,))
    given = [responses[0] for responses in sample["resps"]]
    return Item(
        **named,
        loglikelihoods=tuple(score for score, _ in given),
        greedy=tuple(bool(greedy) for _, greedy in given),
        target=target,
    )


def _pooled_error(metric: str, label: str, value: float, items: Sequence[Item]) -> float | None:
    """Standard error of a perplexity over texts (lm-eval gives none), or over the windows of a single text.

    r = Σ log-likelihood / Σ weight is a ratio of sums; its variance is n / (n − 1) · Σ (l − r·w)² / (Σ w)², and that of
    exp(−r) follows by its slope (the delta method; Cochran, Sampling Techniques, chapter 6).
    """
    pairs = [pair for item in items if isinstance(pair := item.scores.get(label), tuple)]
    if len(pairs) == 1 and len(windows := items[0].loglikelihoods) > 1:
        pairs = [(score, pairs[0][1] / len(windows)) for score in windows]
    if len(pairs) < 2:
        return None
    total = sum(weight for _, weight in pairs)
    ratio = sum(score for score, _ in pairs) / total
    spread = sum((score - ratio * weight) ** 2 for score, weight in pairs)
    error = math.sqrt(spread * len(pairs) / (len(pairs) - 1)) / total
    return error / math.log(2) if metric == "bits_per_byte" else value * error
