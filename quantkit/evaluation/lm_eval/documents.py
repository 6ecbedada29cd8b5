"""Documents of the offline tasks, read from a folder of plain files; the YAML in ``tasks`` names these functions.

lm-eval calls them with a task's ``metadata``, of which ``data`` is the folder, and its ``dataset_kwargs``. Fields are those
of the data sets that lm-eval's own tasks of the same names take from the Hub.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

TASKS = Path(__file__).parent / "offline"
SAMPLE = "sample"  # as the folder: the few documents in the package
VARIABLE = "QUANTKIT_DATA"
CHECKOUT = Path(__file__).parents[4] / "shared" / "data"  # beside a checkout of quantkit
TITLE = re.compile(r"\s*= (?!= ).*(?<! =) =\s*")  # of an article; sections have more signs
LABELS = "ABCDEFGHIJ"

Documents = list[dict[str, Any]]


def data_folder(given: str | Path | None = None) -> Path:
    """The folder with the tasks' data: ``given``, $QUANTKIT_DATA, or the one beside a checkout.

    Raises QuantkitError if there is none.
    """
    chosen = given or os.environ.get(VARIABLE) or (CHECKOUT if CHECKOUT.is_dir() else None)
    if str(chosen) == SAMPLE:
        return TASKS / SAMPLE
    if chosen is None:
        raise QuantkitError(
            "the offline tasks have no data",
            hint=f"name its folder with --data or ${VARIABLE}; `--data {SAMPLE}` takes a few documents",
        )
    if not Path(chosen).is_dir():
        raise QuantkitError(
            f"{chosen} is no folder", hint=f"--data or ${VARIABLE} names the folder of the tasks' data, or is {SAMPLE}"
        )
    return Path(chosen)


def arc(subset: str, data: str | None = None, **ignored: Any) -> dict[str, Any]:
    """AI2's Reasoning Challenge, ``easy`` or ``challenge``: arc/arc_SUBSET_{train,test}.jsonl."""

    def document(row: dict[str, Any]) -> dict[str, Any]:
        labels = list(LABELS[: len(row["choices"])])
        return {
            "question": row["question"], "choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["label"]],
        }  # fmt: skip

    folder = data_folder(data) / "arc"
    return _splits(
        {split: [document(row) for row in _lines(folder / f"arc_{subset}_{split}.jsonl")] for split in ("train", "test")}
    )


def piqa(data: str | None = None, **ignored: Any) -> dict[str, Any]:
    """PIQA's validation split: piqa/valid.jsonl, with labels in piqa/valid-labels.lst."""
    folder = data_folder(data) / "piqa"
    rows, labels = _lines(folder / "valid.jsonl"), _read(folder / "valid-labels.lst").split()
    if len(rows) != len(labels):
        raise QuantkitError(f"{folder} has {len(rows)} documents and {len(labels)} labels", hint="get the data again")
    return _splits({"validation": [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]})


def blimp(paradigm: str, data: str | None = None, **ignored: Any) -> dict[str, Any]:
    """Minimal pairs of one paradigm: blimp/PARADIGM.jsonl."""
    return _splits({"train": _lines(data_folder(data) / "blimp" / f"{paradigm}.jsonl")})


def gsm8k(data: str | None = None, **ignored: Any) -> dict[str, Any]:
    """Grade-school problems: gsm8k/{train,test}.jsonl."""
    folder = data_folder(data) / "gsm8k"
    return _splits({split: _lines(folder / f"{split}.jsonl") for split in ("train", "test")})


def wikitext(data: str | None = None, **ignored: Any) -> dict[str, Any]:
    """WikiText-2's test split, one document an article: wikitext2/wiki.test.raw cut at the articles' titles."""
    pages: list[list[str]] = [[]]
    for line in _read(data_folder(data) / "wikitext2" / "wiki.test.raw").split("\n"):
        if TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    texts = ("\n".join(page) for page in pages)
    return _splits({"test": [{"page": text} for text in texts if text.strip()]})


def wikitext_stream(data: str | None = None, **ignored: Any) -> dict[str, Any]:
    """The same file as one text, without the newline at its end, which llama.cpp's tools leave out too."""
    return _splits({"test": [{"text": _read(data_folder(data) / "wikitext2" / "wiki.test.raw").removesuffix("\n")}]})


def windows_perplexity(document: dict[str, Any], results: list[list[tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """(log-likelihood, tokens) of all windows of a text, of which lm-eval makes a perplexity."""
    (windows,) = results
    return {"perplexity": (sum(score for score, _ in windows), sum(count for _, count in windows))}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise QuantkitError(
            f"cannot read {path}: {error.strerror}", hint=f"--data names a folder with {path.parent.name}/{path.name}"
        ) from None
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{path} is not UTF-8 text (byte {error.start})", hint="get the data again") from None


def _lines(path: Path) -> Documents:
    """JSON objects of a file, one a line."""
    out = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise QuantkitError(f"{path}:{number} is not JSON ({error})", hint="get the data again") from None
        out.append(row)
    return out


def _splits(documents: dict[str, Documents]) -> dict[str, Any]:
    from datasets import Dataset

    return {split: Dataset.from_list(rows) for split, rows in documents.items()}
