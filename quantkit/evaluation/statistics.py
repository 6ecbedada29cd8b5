"""How sure a difference between two models is, when both answered the same questions or read the same text.

Paired differences are taken item by item. Items that belong together (tokens of a document, questions about one passage) form
blocks: blocks are drawn anew in the bootstrap, and standard errors are those of sums over blocks (Miller, "Adding Error Bars
to Evals", arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 2000
BATCH = 1 << 22  # numbers drawn at a time
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Ends of a confidence interval."""

    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True)
class Flips:
    """Answers of two models to the same questions. lost: right before and wrong after; gained: the other way around.

    p_value: chance of a split at least as uneven if losing and gaining were equally likely (McNemar's exact test).
    """

    both_right: int
    lost: int
    gained: int
    both_wrong: int
    p_value: float

    @property
    def total(self) -> int:
        """Questions asked."""
        return self.both_right + self.lost + self.gained + self.both_wrong


@dataclass(frozen=True)
class Difference:
    """Mean of after − before, its standard error and bootstrap interval (both None where one block has no spread)."""

    items: int
    blocks: int
    before: float
    after: float
    mean: float
    error: float | None
    interval: Interval | None


def flips(before: Sequence[bool] | npt.NDArray[Any], after: Sequence[bool] | npt.NDArray[Any]) -> Flips:
    """Count what changed between two models' answers, (n,) right or wrong each. Raises ValueError if they differ in number."""
    a, b = np.asarray(before, bool), np.asarray(after, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} answers before, {b.size} after")
    lost, gained = int((a & ~b).sum()), int((~a & b).sum())
    return Flips(int((a & b).sum()), lost, gained, int((~a & ~b).sum()), mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's test, exact: given lost + gained changes, each way has the chance ½; 1 without changes.

    McNemar, Psychometrika 12 (1947) 153; the exact form: Fagerland, Lydersen and Laake, BMC Med. Res. Methodol. 13 (2013) 91.
    """
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def paired_difference(
    before: npt.ArrayLike, after: npt.ArrayLike, blocks: npt.ArrayLike | None = None, *, level: float = LEVEL,
    resamples: int = RESAMPLES, seed: int = 0, method: str = "percentile",
) -> Difference:  # fmt: skip
    """after − before, item by item, (n,) each; blocks: what each item belongs to, (n,), or every item by itself.

    Raises ValueError if they differ in number or there is none. The other arguments are those of ``bootstrap_mean``.
    """
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"{a.size} items before, {b.size} after")
    sums, counts = _per_block(b - a, blocks)
    return Difference(
        items=len(a),
        blocks=len(sums),
        before=float(a.mean()),
        after=float(b.mean()),
        mean=float((b - a).mean()),
        error=_error(sums, counts),
        interval=_interval(sums, counts, level, resamples, seed, method),
    )


def paired_ratio(before: npt.ArrayLike, after: npt.ArrayLike, weights: npt.ArrayLike, level: float = LEVEL) -> Difference:
    """Σ after ÷ Σ weights − Σ before ÷ Σ weights, of items in pairs, (n,) each: log-likelihoods of texts and their words, say.

    The error is that of a ratio of sums of the differences (the delta method; Cochran, Sampling Techniques, chapter 6). The
    interval is Student's with n − 1 degrees of freedom, because texts are often few, where a bootstrap interval is too
    narrow. Raises ValueError if numbers of items differ, or a weight is not positive.
    """
    a, b, w = (np.asarray(some, np.float64) for some in (before, after, weights))
    if not a.shape == b.shape == w.shape or a.ndim != 1 or not a.size or not (w > 0).all():
        raise ValueError(f"{a.size} items before, {b.size} after, {w.size} weights")
    mean, error = float((b - a).sum() / w.sum()), _error(b - a, w)
    return Difference(
        items=len(a), blocks=len(a), before=float(a.sum() / w.sum()), after=float(b.sum() / w.sum()), mean=mean, error=error,
        interval=None if error is None else _student(mean, error, len(a) - 1, level),
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the same order: below α, at most with chance α one of all is wrong.

    It holds whatever the tests have to do with each other (Holm, Scandinavian Journal of Statistics 6 (1979) 65).
    """
    out, largest, n = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, place in enumerate(sorted(range(n), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (n - rank) * p_values[place]))
        out[place] = largest
    return out


def standard_error(values: npt.ArrayLike, blocks: npt.ArrayLike | None = None) -> float | None:
    """Of the mean of values (n,), whose blocks are independent of each other; None with fewer than two blocks."""
    return _error(*_per_block(np.asarray(values, np.float64), blocks))


def bootstrap_mean(
    values: npt.ArrayLike, blocks: npt.ArrayLike | None = None, *, level: float = LEVEL, resamples: int = RESAMPLES,
    seed: int = 0, method: str = "percentile",
) -> Interval | None:  # fmt: skip
    """Bootstrap interval of the mean of values (n,), by drawing whole blocks; None with fewer than two blocks.

    method: ``percentile`` or ``BCa`` (bias corrected and accelerated: Efron, JASA 82 (1987) 171; it takes time and memory with
    the square of the number of blocks). The same seed gives the same interval.
    """
    return _interval(*_per_block(np.asarray(values, np.float64), blocks), level, resamples, seed, method)


def ratio_interval(of_log: Interval | None) -> Interval | None:
    """The interval of exp(x) from that of x: of a perplexity ratio from the mean difference of log-likelihoods."""
    if of_log is None:
        return None
    low, high = (math.exp(end) if end < 709 else math.inf for end in (of_log.low, of_log.high))  # two wrecked texts, say
    return Interval(low, high, of_log.level)


def _per_block(values: Values, blocks: npt.ArrayLike | None) -> tuple[Values, Values]:
    """(sum, number of items) of each block."""
    if blocks is None:
        return values, np.ones_like(values)
    names = np.asarray(blocks)
    if names.shape != values.shape:
        raise ValueError(f"{values.size} items in {names.size} blocks")
    _, place = np.unique(names, return_inverse=True)
    return np.bincount(place, values).astype(np.float64), np.bincount(place).astype(np.float64)


def _error(sums: Values, counts: Values) -> float | None:
    """Standard error of Σ sums ÷ Σ counts (linearized ratio; with blocks of one item that of the mean)."""
    n = len(sums)
    if n < 2:
        return None
    rest = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt((rest**2).sum() * n / (n - 1)) / counts.sum())


def _student(mean: float, error: float, freedom: int, level: float) -> Interval:
    from scipy.stats import t

    reach = float(t.ppf((1 + level) / 2, freedom)) * error
    return Interval(mean - reach, mean + reach, level)


def _interval(sums: Values, counts: Values, level: float, resamples: int, seed: int, method: str) -> Interval | None:
    from scipy.stats import bootstrap

    if len(sums) < 2:
        return None
    mean = float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) == 0:
        return Interval(mean, mean, level)
    found = bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis), paired=True, vectorized=True, method=method,
        n_resamples=resamples, confidence_level=level, batch=max(1, BATCH // len(sums)), random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    if math.isnan(found.low) and method == "BCa":  # all draws on one side of the mean, say
        return _interval(sums, counts, level, resamples, seed, "percentile")
    return Interval(float(found.low), float(found.high), level)
