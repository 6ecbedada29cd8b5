"""No calibration text is ever part of a judged text: no run of words is in both."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny

from quantkit.analysis.texts import DATA, DEFAULT_MIX
from quantkit.evaluation.texts import default_texts

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

RUN = 13  # words in a row that no calibration text may share with a judged one
LONG_RUN = 20  # the same for what the calibration texts are cut from: stories share stock phrases of up to 16 words
FACTOR = np.uint64(0x9E3779B97F4A7C15)


@cache
def words_of(text: str) -> list[str]:
    """Lower case, without punctuation: WikiText sets spaces around it and writes " @-@ " inside words."""
    return re.findall(r"\w+", text.lower())


@cache
def run_hashes(text: str, length: int) -> np.ndarray:
    """A hash of every run of ``length`` words, uint64 (number of runs,)."""
    words = words_of(text)
    ids = np.array([hash(word) for word in words], dtype=np.int64).view(np.uint64)
    count = max(0, len(words) - length + 1)
    out = np.zeros(count, np.uint64)
    for i in range(length):
        out = out * FACTOR + ids[i : i + count]
    return out


def shared_passages(calibration: str, judged: str, length: int) -> list[str]:
    """The runs of ``length`` words of the judged text that are in the calibration text too."""
    words = words_of(judged)
    found = np.flatnonzero(np.isin(run_hashes(judged, length), run_hashes(calibration, length)))
    return [" ".join(words[i : i + length]) for i in found]


def chat_text(path: Path) -> str:
    """What is said in a .jsonl file of messages."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return "\n".join(message["content"] for row in rows for message in row["messages"])


def calibration_texts() -> dict[str, str]:
    """The mix inside the package and the text of the examples."""
    mix = {name: chat_text(DATA / name) if name.endswith(".jsonl") else (DATA / name).read_text() for name in DEFAULT_MIX}
    return {**mix, "examples": (tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()}


def shared_text(name: str) -> str:
    """A text of ../shared; skips the test where there is none."""
    path = oracle.SHARED / "data" / name
    if not path.exists():
        oracle.missing(str(path))
    return path.read_text(encoding="utf-8")


def judged_texts() -> dict[str, str]:
    """What comparisons and benchmarks judge on."""
    from allocation import JUDGED, LEFT_OUT, LEFT_OUT_CHARACTERS

    return {
        **{path.name: path.read_text() for path in default_texts()},
        **{n: shared_text(name) for n, name in JUDGED.items()},
        **{n: shared_text(name)[-LEFT_OUT_CHARACTERS:] for n, name in LEFT_OUT.items()},
    }


def check(calibration: dict[str, str], judged: dict[str, str], length: int) -> None:
    """Fail with the first passage of ``length`` words that is in a calibration text and in a judged one."""
    for name, text in calibration.items():
        for where, other in judged.items():
            found = shared_passages(text, other, length)
            assert not found, f"{name} and {where} share {len(found)} runs of {length} words, first: {found[0]!r}"


def test_the_shipped_texts():
    """The default mix and the examples against the text that comparisons use by default."""
    check(calibration_texts(), {path.name: path.read_text() for path in default_texts()}, RUN)


def test_no_calibration_text_is_judged():
    """Everything that anybody calibrates on against everything judged."""
    from allocation import CALIBRATION, CALIBRATION_BYTES

    used = {name: shared_text(name)[:CALIBRATION_BYTES] for name in CALIBRATION}
    check({**calibration_texts(), **used}, judged_texts(), RUN)


def test_not_even_their_sources():
    """The whole files that calibration texts are the beginnings of."""
    from allocation import CALIBRATION

    check({name: shared_text(name) for name in CALIBRATION}, judged_texts(), LONG_RUN)


@pytest.mark.parametrize("where", ["beginning", "middle", "end"])
def test_a_planted_passage_is_found(where):
    """A passage of a judged text in other case and punctuation; one word fewer is not a passage."""
    judged = default_texts()[0].read_text()
    words = words_of(judged)[200 : 200 + RUN]
    mix = calibration_texts()["web.txt"]
    at = {"beginning": 0, "middle": len(mix) // 2, "end": len(mix)}[where]
    planted = f"{mix[:at]} -- {', '.join(words).upper()} .. {mix[at:]}"
    assert " ".join(words) in shared_passages(planted, judged, RUN)
    with pytest.raises(AssertionError, match=re.escape(" ".join(words))):
        check({"planted": planted}, {"judged": judged}, RUN)
    shorter = f"{mix[:at]} zzz {' '.join(words[:-1])} zzz {mix[at:]}"
    assert not shared_passages(shorter, judged, RUN)
