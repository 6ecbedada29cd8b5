"""What an evaluation found: for each model and task the metrics with their errors, and the answer to every document.

A results file is one JSON object, ``{"quantkit_eval": 1, …}`` with the fields of EvalReport; ``read_results`` gives the
report back. Documents of two models are the same if their ``hash`` is, so paired statistics need nothing else.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint.documents import strict_json
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

SAMPLED = ("pass@", "majority@")  # what several answers to a question are scored by; lies between 0 and 1 too

Value = float | tuple[float, float]


@dataclass(frozen=True)
class Item:
    """One document. doc: its number in the task's split. hash: of its content, the same for every model.

    scores: by metric, as ``Score.name`` has it: 1.0 for right and 0.0 for wrong, or a pair (log-likelihood, weight) of a
    perplexity. loglikelihoods: of the choices, in nats; of a text, or of each of its windows (of equal length). greedy:
    whether each choice is what the model would have said. target: number of the right choice, or the right answer. text:
    what was generated (the first of several answers).

    question, expected, said: in a few words, what was asked, the right answer, and by metric what the model answered.
    samples: answers that were drawn. right: by metric, how many of these are right.
    """

    doc: int
    hash: str
    scores: dict[str, Value]
    loglikelihoods: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    target: int | str | None = None
    text: str | None = None
    question: str = ""
    expected: str = ""
    said: dict[str, str] = field(default_factory=dict)
    samples: int = 1
    right: dict[str, int] = field(default_factory=dict)

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

    @property
    def main(self) -> Score | None:
        """The share that stands for the task: normalized accuracy before plain accuracy before any other."""
        shares = [score for score in self.scores if score.unit == "share"]
        order = ("acc_norm", "acc", "exact_match")
        return next((s for name in order for s in shares if s.name.partition(",")[0] == name), shares[0] if shares else None)


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
    """models: the first is the reference. tasks: names as asked for, groups and single tasks. limit: documents of a task.

    samples: answers that were drawn to each question that allows it, at this temperature with this seed; 1: none was drawn.
    """

    tasks: tuple[str, ...]
    models: tuple[ModelScores, ...]
    limit: int | None = None
    chat: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    samples: int = 1
    temperature: float | None = None
    seed: int = 0

    def to_json(self, items: bool = True) -> str:
        """The document as text; without ``items``, metrics only."""
        document = {"quantkit_eval": VERSION, **asdict(self)}
        if not items:
            for model in document["models"]:
                for result in model["results"].values():
                    del result["items"]
        return strict_json(document)


def is_share(metric: str) -> bool:
    """Whether a metric (``Score.name``) lies between 0 and 1, with the share of right answers for its mean."""
    name = metric.partition(",")[0]
    return name in SHARES or name.startswith(SAMPLED)


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
    scores = tuple(Score(**score | {"value": _number(score["value"])}) for score in found.pop("scores"))
    items = tuple(_item(item) for item in found.pop("items", ()))
    return TaskScores(**found | {"members": tuple(found["members"])}, scores=scores, items=items)


def _item(found: dict[str, Any]) -> Item:
    scores = {
        name: tuple(map(_number, value)) if isinstance(value, list) else _number(value) for name, value in found["scores"].items()
    }
    loglikelihoods = tuple(map(_number, found["loglikelihoods"]))
    return Item(**found | {"scores": scores, "loglikelihoods": loglikelihoods, "greedy": tuple(found["greedy"])})


def _number(found: float | None) -> float:
    """JSON has no number that is not finite; null stands for it."""
    return math.nan if found is None else found
