"""What an evaluation found: for each model and task the metrics with their errors, and the answer to every document.

A results file is one JSON object, ``{"quantkit_eval": 1, …}`` with the fields of EvalReport; ``read_results`` gives the
report back. Documents of two models are the same if their ``hash`` is, so paired statistics need nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import read_json
from quantkit.errors import QuantkitError

VERSION = 1
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "em")  # metrics between 0 and 1
UNITS = {
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits per byte",
    "perplexity": "per token",
}

Value = float | tuple[float, float]


@dataclass(frozen=True)
class Item:
    """One document. doc: its number in the task's split. hash: of its content, the same for every model.

    scores: by metric, as ``Score.name`` has it: 1.0 for right and 0.0 for wrong, or a pair (log-likelihood, weight) of a
    perplexity. loglikelihoods: of the choices, in nats; of a text, or of each of its windows (of equal length). greedy:
    whether each choice is what the model would have said. target: number of the right choice, or the right answer. text:
    what was generated.
    """

    doc: int
    hash: str
    scores: dict[str, Value]
    loglikelihoods: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    target: int | str | None = None
    text: str | None = None

    @property
    def chosen(self) -> int | None:
        """The choice that the model holds for the likeliest; None for a text."""
        return max(range(len(self.loglikelihoods)), key=self.loglikelihoods.__getitem__) if self.greedy else None


@dataclass(frozen=True)
class Score:
    """One metric. name: with lm-eval's filter after a comma where it has one. stderr: None if it cannot be known.

    unit: ``share`` for what lies between 0 and 1, else in words.
    """

    name: str
    value: float
    stderr: float | None
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class TaskScores:
    """One task or group. documents: how many were asked. members: the tasks of a group, which has no items of its own."""

    task: str
    shots: int
    version: str
    documents: int
    scores: tuple[Score, ...]
    items: tuple[Item, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelScores:
    """One model. source: its path, or the endpoint. identity: of the weights (of a served model: its name there).

    window: tokens of context. truncated: how many requests lost tokens from the left to fit it (None: not known).
    """

    name: str
    source: str
    runtime: str
    identity: str
    file_bytes: int | None
    window: int
    truncated: int | None
    seconds: float
    results: dict[str, TaskScores]


@dataclass(frozen=True)
class EvalReport:
    """models: the first is the reference. tasks: names as asked for, groups and single tasks. limit: documents of a task."""

    tasks: tuple[str, ...]
    models: tuple[ModelScores, ...]
    limit: int | None = None
    chat: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self, items: bool = True) -> str:
        """The document as text; without ``items``, metrics only."""
        document = {"quantkit_eval": VERSION, **asdict(self)}
        if not items:
            for model in document["models"]:
                for result in model["results"].values():
                    del result["items"]
        return json.dumps(document)


def read_results(path: Path) -> EvalReport:
    """A results file. Raises QuantkitError if it is none, or of another version."""
    document = read_json(path)
    if document.pop("quantkit_eval", None) != VERSION:
        raise QuantkitError(f"{path} holds no results of this version", hint="make them with `quantkit eval -o`")
    try:
        models = tuple(_model(model) for model in document.pop("models"))
        return EvalReport(tuple(document.pop("tasks")), models, **document)
    except (KeyError, TypeError, AttributeError) as error:
        raise QuantkitError(f"{path} is damaged ({type(error).__name__}: {error})", hint="make it again") from None


def _model(found: dict[str, Any]) -> ModelScores:
    results = {name: _task(task) for name, task in found.pop("results").items()}
    return ModelScores(**found, results=results)


def _task(found: dict[str, Any]) -> TaskScores:
    scores = tuple(Score(**score) for score in found.pop("scores"))
    items = tuple(_item(item) for item in found.pop("items", ()))
    return TaskScores(**found | {"members": tuple(found["members"])}, scores=scores, items=items)


def _item(found: dict[str, Any]) -> Item:
    scores = {name: tuple(value) if isinstance(value, list) else value for name, value in found["scores"].items()}
    return Item(**found | {"scores": scores, "loglikelihoods": tuple(found["loglikelihoods"]), "greedy": tuple(found["greedy"])})


def task_scores(name: str, results: dict[str, Any]) -> TaskScores:
    """One task or group out of what lm-eval's ``evaluate`` gives."""
    found = results["results"][name]
    items = _items(results["samples"][name]) if name in results.get("samples", {}) else ()
    scores = []
    for key, value in found.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if kind == "none" else key
        stderr = found.get(f"{metric}_stderr,{kind}")
        error = float(stderr) if isinstance(stderr, float | int) else _pooled_error(metric, label, float(value), items)
        higher = bool(results["higher_is_better"].get(name, {}).get(metric, True))
        scores.append(Score(label, float(value), error, "share" if metric in SHARES else UNITS.get(metric, ""), higher))
    return TaskScores(
        name, int(results["n-shot"].get(name) or 0), str(results["versions"].get(name)), int(found.get("sample_len", len(items))),
        tuple(scores), items, tuple(results.get("group_subtasks", {}).get(name, ())),
    )  # fmt: skip


def _items(samples: Sequence[dict[str, Any]]) -> tuple[Item, ...]:
    """lm-eval logs a document once for each filter; here it is one item."""
    out: dict[int, Item] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        values = {f"{metric}{suffix}": _value(metric, sample[metric]) for metric in sample["metrics"]}
        scores = {name: value for name, value in values.items() if value is not None}
        known = out.get(sample["doc_id"])
        out[sample["doc_id"]] = _answer(sample, (known.scores if known else {}) | scores)
    return tuple(out[doc] for doc in sorted(out))


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
