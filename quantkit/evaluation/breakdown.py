"""A candidate judged window by window, and where it departs from the original: which text, where in the window, at how
frequent tokens, how sure the original was, and at which tokens most.

Everything is summed as the windows come, so memory does not grow with the text.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.metrics import TokenScores, best_and_logsumexp, kl_divergence_by_rows

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
POSITIONS = 8  # equal parts of the scored positions
RANKS = (10, 100, 1000, 10000)
CHANCES = (0.2, 0.5, 0.9, 0.99)
ENTROPIES = (0.1, 0.5, 1.0, 2.0, 4.0)
WORST = 20
CONTEXT = 24  # tokens shown before one of the worst


class Estimate(NamedTuple):
    """KL divergence of each token, nats, and the variance of its estimate (0 where it is exact), float32 (n,)."""

    kld: Floats
    variance: Floats


class KnownWindow(Protocol):
    """The original at the n scored positions of a window: most likely token, log-probabilities of it and of the token that
    follows in the text, entropy in nats; (n,) each."""

    @property
    def next_logp(self) -> Floats: ...

    @property
    def top1(self) -> Ids: ...

    @property
    def top1_logp(self) -> Floats: ...

    @property
    def entropy(self) -> Floats: ...

    def divergence(self, logits: torch.Tensor, total: torch.Tensor | None = None) -> Estimate:
        """From the original to a candidate with these logits, float32 (n, vocabulary). total: their logsumexp, if known."""


@dataclass(frozen=True)
class ExactWindow:
    """A window whose whole distributions are at hand: logp and p, its exponential, are torch float32 (n, vocabulary)."""

    logp: torch.Tensor
    p: torch.Tensor
    next_logp: Floats
    top1: Ids
    top1_logp: Floats
    entropy: Floats

    @staticmethod
    def of(logits: torch.Tensor, following: Ids) -> ExactWindow:
        """From the original's logits (n, vocabulary) and the tokens that follow (n,)."""
        import torch

        top1, total = best_and_logsumexp(logits)
        logp = logits - total[:, None]
        p, top1_logp = logp.exp(), logp.gather(1, top1[:, None])[:, 0]
        chosen = logp.gather(1, torch.from_numpy(following)[:, None])[:, 0]
        entropy = -torch.linalg.vecdot(p, logp)
        if not entropy.isfinite().all():  # logits of −∞
            entropy = -torch.linalg.vecdot(p, logp.clamp_min(-1e30))
        return ExactWindow(logp, p, chosen.numpy(), top1.numpy(), top1_logp.numpy(), entropy.numpy())

    def divergence(self, logits: torch.Tensor, total: torch.Tensor | None = None) -> Estimate:
        """See :class:`KnownWindow`."""
        total = logits.logsumexp(-1) if total is None else total
        kld = kl_divergence_by_rows(self.logp, self.p, logits, total).numpy()
        return Estimate(kld, np.zeros_like(kld))


@dataclass(frozen=True)
class Judged:
    """A candidate on one window: its scores, most likely tokens with their log-probabilities, variance of the divergence."""

    scores: TokenScores
    guess: Ids
    guess_logp: Floats
    variance: Floats


def judge(known: KnownWindow, logits: torch.Tensor, following: Ids) -> Judged:
    """Score a candidate's logits, float32 (n, vocabulary), against what is known of the original.

    following: the tokens that follow the scored positions, (n,).
    """
    import torch

    guess, total = best_and_logsumexp(logits)
    logp = logits.gather(1, torch.from_numpy(following)[:, None])[:, 0] - total
    kld, variance = known.divergence(logits, total)
    scores = TokenScores(kld, logp.numpy(), known.next_logp, guess.numpy() == known.top1)
    return Judged(scores, guess.numpy(), (logits.gather(1, guess[:, None])[:, 0] - total).numpy(), variance)


@dataclass(frozen=True)
class Group:
    """Tokens that have something in common. KLD in nats per token; share: of the whole divergence; error: standard error."""

    name: str
    tokens: int
    mean_kld: float
    error: float
    share: float
    top1_agreement: float


@dataclass(frozen=True)
class WorstToken:
    """Where the divergence was largest: what came before, what followed, what each model expected and how surely."""

    kld: float
    text: str
    context: str
    following: str
    original_guess: str
    original_chance: float
    candidate_guess: str
    candidate_chance: float


@dataclass(frozen=True)
class Breakdown:
    """Where the divergence of one candidate comes from; groups without tokens are left out.

    frequency: rank of the token to be predicted among those of the text. certainty: probability of the original's best
    token. entropy: of the original's distribution, nats.
    """

    text: list[Group]
    position: list[Group]
    frequency: list[Group]
    certainty: list[Group]
    entropy: list[Group]
    worst: list[WorstToken]


class _Axis:
    """Sums over the groups of one kind."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.sums = np.zeros((4, len(names)))  # tokens, KLD, its square, agreement

    def add(self, group: npt.NDArray[Any], kld: npt.NDArray[np.float64], same: npt.NDArray[np.bool_]) -> None:
        for row, weights in enumerate((None, kld, kld * kld, same)):
            self.sums[row] += np.bincount(group, weights, len(self.names))

    def groups(self) -> list[Group]:
        whole = self.sums[1].sum() or 1.0
        out = []
        for name, (n, total, squares, same) in zip(self.names, self.sums.T, strict=True):
            if n:
                mean = total / n
                error = np.sqrt(max(squares / n - mean * mean, 0) / max(n - 1, 1))
                out.append(Group(name, int(n), float(mean), float(error), float(total / whole), float(same / n)))
        return out


def _between(edges: tuple[float, ...], form: str) -> list[str]:
    """Names of the groups that edges part."""
    shown = [format(edge, form) for edge in edges]
    return [f"below {shown[0]}", *(f"{a} to {b}" for a, b in pairwise(shown)), f"{shown[-1]} and above"]


def _rank_names() -> list[str]:
    starts = [1, *(edge + 1 for edge in RANKS)]
    return [f"{a:,}–{b:,}" for a, b in zip(starts, RANKS, strict=False)] + [f"above {RANKS[-1]:,}"]


def frequency_ranks(windows: Ids) -> Ids:
    """Rank of each token id among those of the windows, 1 for the most frequent, int64 (largest id + 1,)."""
    counts = np.bincount(windows.reshape(-1))
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return ranks


@dataclass
class Tally:
    """Sums of one candidate. windows: token ids, int64 (n, window). texts: (name, windows) of each text, in their order."""

    windows: Ids
    texts: list[tuple[str, int]]
    worst: int = WORST
    _axes: dict[str, _Axis] = field(init=False, repr=False)
    _heap: list[tuple[Any, ...]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        half = self.windows.shape[1] // 2
        scored = self.windows.shape[1] - half - 1
        self._half, self._ranks = half, frequency_ranks(self.windows)
        self._text_of = np.repeat(np.arange(len(self.texts)), [count for _, count in self.texts])
        parts = min(POSITIONS, scored)
        self._part = np.arange(scored) * parts // scored
        first = half + 1 + np.searchsorted(self._part, np.arange(parts + 1))
        self._axes = {
            "text": _Axis([name for name, _ in self.texts]),
            "position": _Axis([f"{a}–{b - 1}" for a, b in pairwise(first)]),
            "frequency": _Axis(_rank_names()),
            "certainty": _Axis(_between(CHANCES, ".0%")),
            "entropy": _Axis(_between(ENTROPIES, "g")),
        }

    def add(self, index: int, known: KnownWindow, judged: Judged) -> None:
        """Count one window, the ``index``-th of the text."""
        kld, same = judged.scores.kld.astype(np.float64), judged.scores.same_top
        following = self.windows[index, self._half + 1 :]
        groups = {
            "text": np.full(len(kld), self._text_of[index]),
            "position": self._part,
            "frequency": np.searchsorted(RANKS, self._ranks[following]),
            "certainty": np.searchsorted(CHANCES, np.exp(known.top1_logp), side="right"),
            "entropy": np.searchsorted(ENTROPIES, known.entropy, side="right"),
        }
        for name, group in groups.items():
            self._axes[name].add(group, kld, same)
        least = self._heap[0][0] if len(self._heap) == self.worst else -1.0
        for place in np.argsort(-kld)[: self.worst]:
            if kld[place] <= least:
                break
            said = (known.top1[place], known.top1_logp[place], judged.guess[place], judged.guess_logp[place])
            entry = (float(kld[place]), -index, -int(place), *said)
            (heapq.heappush if len(self._heap) < self.worst else heapq.heappushpop)(self._heap, entry)

    def result(self, decode: Callable[[list[int]], str]) -> Breakdown:
        """What was counted. decode: gives the text of token ids."""
        groups = {name: axis.groups() for name, axis in self._axes.items()}
        return Breakdown(**groups, worst=[self._shown(entry, decode) for entry in sorted(self._heap, reverse=True)])

    def _shown(self, entry: tuple[Any, ...], decode: Callable[[list[int]], str]) -> WorstToken:
        kld, index, place, best, best_logp, guess, guess_logp = entry
        at = self._half - place
        ids = self.windows[-index, : at + 2].tolist()
        return WorstToken(
            kld=kld,
            text=self.texts[self._text_of[-index]][0],
            context=decode(ids[:-1][-CONTEXT:]),
            following=decode(ids[-1:]),
            original_guess=decode([int(best)]),
            original_chance=float(np.exp(best_logp)),
            candidate_guess=decode([int(guess)]),
            candidate_chance=float(np.exp(guess_logp)),
        )
