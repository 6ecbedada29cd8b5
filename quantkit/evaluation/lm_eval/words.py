"""What a document asked and what a model answered, in a few words: for lists of answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

QUESTION = 200  # characters that are kept of a question
ANSWER = 160  # and of an answer: BLiMP's pairs differ somewhere in the middle
BY_LENGTH = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}  # what lm-eval divides a choice's score by


@dataclass(frozen=True)
class Words:
    """question: without examples. expected: the right answer. said: by metric, the model's. Shortened all of them."""

    question: str = ""
    expected: str = ""
    said: dict[str, str] = field(default_factory=dict)


def excerpt(text: str, limit: int) -> str:
    """A text in one line of at most ``limit`` characters: its beginning and its end, where both often matter."""
    line = " ".join(text.split())
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in line)
    if len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[: limit - 3 - half].rstrip()} … {line[-half:].lstrip()}"


def words_of(task: Any, sample: dict[str, Any], suffix: str) -> Words:
    """The words of one of lm-eval's samples. suffix: of the names of its metrics, from its filter.

    Empty for tasks of an own class that cannot tell, and where nothing is right or wrong.
    """
    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind == "multiple_choice" and getattr(task.config, "doc_to_choice", None) is not None:
        return _choice(task, sample)
    if kind == "generate_until":
        said = _text(sample["filtered_resps"][0])
        target = sample["target"]
        if isinstance(target, int) and getattr(task.config, "doc_to_choice", None) is not None:
            target = task.doc_to_choice(sample["doc"])[target]
        words = {f"{metric}{suffix}": excerpt(said, ANSWER) for metric in sample["metrics"]}
        return Words(_question(task, sample["doc"]), excerpt(_text(target), ANSWER), words)
    return Words()


def _choice(task: Any, sample: dict[str, Any]) -> Words:
    """Which choice each metric takes for the answer: the likeliest one, or the likeliest for its length."""
    doc, choices = sample["doc"], [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    scores = [responses[0][0] for responses in sample["resps"]][: len(choices)]
    target = task.doc_to_text(doc) if task.multiple_input else sample["target"]
    if isinstance(target, list | tuple):
        expected = " / ".join(_named(choices, one) for one in target)
    else:
        expected = _named(choices, target)
    said = {}
    for metric in sample["metrics"]:
        if metric == "acc" or metric in BY_LENGTH:
            lengths = [max(BY_LENGTH[metric](choice), 1) if metric in BY_LENGTH else 1 for choice in choices]
            shares = [score / length for score, length in zip(scores, lengths, strict=True)]
            said[metric] = excerpt(choices[max(range(len(choices)), key=shares.__getitem__)], ANSWER)
    return Words(_question(task, doc), excerpt(expected, ANSWER), said)


def _named(choices: Sequence[str], target: Any) -> str:
    """A choice by its number; what is none stays as it is."""
    return choices[target] if isinstance(target, int) and 0 <= target < len(choices) else str(target)


def _question(task: Any, doc: dict[str, Any]) -> str:
    """What was asked, without examples; where choices stand in the middle of a text, what follows them."""
    asked = task.doc_to_text(doc)
    return excerpt(asked if isinstance(asked, str) else _text(task.doc_to_target(doc)), QUESTION)


def _text(found: Any) -> str:
    """A generated text or a right answer: the first if there are several."""
    return _text(found[0]) if isinstance(found, list | tuple) and found else str(found)
