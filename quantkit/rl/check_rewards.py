"""Do rewards reward what they should: good completions against bad ones, and against those that merely look right."""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import RewardError
from quantkit.rl.data import Row
from quantkit.rl.rewards.base import text_of
from quantkit.rl.rewards.checked import checked

PATIENCE = 10.0  # seconds that a reward may take for all samples
CLOSE = 0.05  # of the distance between good and bad: as good as the best
Values = list[float | None]


class TimeUp(BaseException):
    """No Exception, so that no reward and no guard takes it for one of its own."""


@dataclass
class Finding:
    """What is known of one reward.

    good, bad: mean over the samples of each kind. right: share of pairs of a good and a bad one that it ranks so (a tie
    counts half). degenerate: name of a kind of completion that nobody wants → its mean. warnings: in words.
    """

    name: str
    good: float | None = None
    bad: float | None = None
    right: float | None = None
    milliseconds: float | None = None
    degenerate: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check_rewards(rewards: list[Any], good: list[Row], bad: list[Row], patience: float = PATIENCE) -> list[Finding]:
    """What each reward, and all together, make of samples with ``prompt``, ``completion`` and other columns.

    Every reward is called as training would call it. One that fails or takes longer than ``patience`` seconds is a finding,
    not an error. Raises RewardError if there are no good samples.
    """
    if not good:
        raise RewardError("there are no good samples", hint="give completions that deserve a reward, one a line")
    kinds = {"good": good, "bad": bad, **degenerate_samples(good)}
    findings, totals = [], {kind: [0.0] * len(rows) for kind, rows in kinds.items()}
    for reward in map(checked, rewards):
        finding = Finding(getattr(reward, "__name__", type(reward).__name__))
        findings.append(finding)
        values: dict[str, Values] = {}
        try:
            with limit(patience):
                started = time.perf_counter()
                values["good"] = values_of(reward, good)
                finding.milliseconds = (time.perf_counter() - started) * 1e3 / len(good)
                values |= {kind: values_of(reward, rows) for kind, rows in kinds.items() if kind != "good" and rows}
                _steady(reward, good, values["good"], finding)
        except TimeUp:
            finding.warnings.append(f"hangs: no values after {patience:g} s")
            continue
        except RewardError as error:
            finding.warnings.append(f"fails: {error.what}")
            continue
        for kind, found in values.items():
            totals[kind] = [a + (b or 0.0) for a, b in zip(totals[kind], found, strict=True)]
        _judge(finding, values, alone=len(rewards) == 1)
    if len(rewards) > 1:
        together = Finding("all together")
        _judge(together, {kind: list(found) for kind, found in totals.items() if found}, alone=True)
        findings.append(together)
    return findings


def values_of(reward: Callable[..., Any], rows: list[Row]) -> Values:
    """A reward's values for samples."""
    names = {name for row in rows for name in row} - {"prompt", "completion"}
    columns = {name: [row.get(name) for row in rows] for name in names}
    return list(
        reward(prompts=[row.get("prompt", "") for row in rows], completions=[row["completion"] for row in rows], **columns)
    )


def degenerate_samples(good: list[Row]) -> dict[str, list[Row]]:
    """Completions that nobody wants, made of good ones: what a model drifts to if a reward pays for it."""
    texts = [text_of(row["completion"]) for row in good]
    answers = [str(row.get("answer", "")) for row in good]
    usual = Counter(answer for answer in answers if answer).most_common(1)
    words = sorted({word for text in texts for word in text.split()})
    draw = random.Random(0)
    nonsense = [" ".join(draw.choices(words or ["word"], k=40)) for _ in good]
    made: dict[str, list[str]] = {
        "nothing": [""] * len(good),
        "the prompt again": [str(row.get("prompt", "")) for row in good],
        "a good one of another prompt": texts[1:] + texts[:1] if len(set(texts)) > 1 else [],
        "a good one twice": [f"{text}\n{text}" for text in texts],
        "fluent nonsense": nonsense,
    }
    if usual:
        made |= {
            "the answer alone": answers,
            "always the same answer": [text.replace(answer, usual[0][0]) if answer else text for text, answer in zip(texts, answers, strict=True)]
            if len(set(answers)) > 1 else [],
            "Hello Hello Hello and the answer": [f"Hello Hello Hello {answer}" for answer in answers],
            "nonsense that ends in the answer": [f"{text} {answer}" for text, answer in zip(nonsense, answers, strict=True)],
        }  # fmt: skip
    return {
        kind: [{**row, "completion": text} for row, text in zip(good, found, strict=True)]
        for kind, found in made.items()
        if found
    }


def _steady(reward: Callable[..., Any], rows: list[Row], values: Values, finding: Finding) -> None:
    """Warn of a reward that says something else the second time, or in another order."""
    if values_of(reward, rows) != values:
        finding.warnings.append("is not steady: the same completions get other values the second time")
    elif values_of(reward, rows[::-1])[::-1] != values:
        finding.warnings.append("depends on the neighbours: in another order the same completions get other values")


def _judge(finding: Finding, values: dict[str, Values], alone: bool) -> None:
    """Means, ranks and warnings from the values of every kind. alone: no other reward tells degenerate ones from good."""
    known = {kind: [v for v in found if v is not None] for kind, found in values.items()}
    means = {kind: statistics.fmean(found) for kind, found in known.items() if found}
    finding.good, finding.bad = means.get("good"), means.get("bad")
    finding.degenerate = {kind: mean for kind, mean in means.items() if kind not in ("good", "bad")}
    if finding.good is None:
        finding.warnings.append("applies to none of the good samples")
        return
    every = [v for found in known.values() for v in found]
    if max(every) == min(every):
        finding.warnings.append(f"is constant: {every[0]:g} for everything")
        return
    if known.get("bad"):
        pairs = [(a > b) + 0.5 * (a == b) for a in known["good"] for b in known["bad"]]
        finding.right = statistics.fmean(pairs)
        if finding.right < 0.5:
            finding.warnings.append(f"disagrees with the labels: only {finding.right:.0%} of the pairs are ranked right")
    if alone:
        _tempting(finding)


def _tempting(finding: Finding) -> None:
    """Warn of degenerate completions that earn as much as good ones."""
    assert finding.good is not None
    least = finding.bad if finding.bad is not None else min(finding.degenerate.values(), default=finding.good)
    near = CLOSE * abs(finding.good - least)
    for kind, mean in finding.degenerate.items():
        if mean >= finding.good - near and kind != "a good one of another prompt":
            finding.warnings.append(f"pays for {kind}: {mean:.3g}, good ones get {finding.good:.3g}")


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside after so many seconds. Only the main thread can be limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
