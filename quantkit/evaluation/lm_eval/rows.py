"""lm-eval's requests as rows of ids, and which of them a pass of the model takes together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantkit.errors import CalibrationError
from quantkit.evaluation.lm_eval.engines import Group

SHARED = 8  # tokens of context from which on it is kept for several continuations; shorter ones are read again
LOGITS = 1 << 28  # logits that a pass may give


@dataclass(frozen=True)
class Row:
    """One continuation to score. place: of its request. context: ids before it. targets: its ids."""

    place: int
    context: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def tail(self) -> tuple[int, ...]:
        """Ids fed after the context: the last target is only predicted."""
        return self.targets[:-1]


@dataclass(frozen=True)
class Batch:
    """groups: what one pass reads. rows: of each group and each of its tails, the continuations that its logits score."""

    groups: tuple[Group, ...]
    rows: tuple[tuple[tuple[Row, ...], ...], ...]


def row_of(place: int, context: Sequence[int], targets: Sequence[int], window: int) -> Row:
    """A row that fits the window; its context loses tokens from the left, as in lm-eval (``window`` ids are fed, one more is scored).

    Raises CalibrationError if the continuation is empty, or alone exceeds the window.
    """
    if not targets or not context:
        raise CalibrationError("an answer or its context has no tokens", hint="the task's answers must not be empty")
    if len(targets) > window:
        raise CalibrationError(
            f"an answer has {len(targets)} tokens, the window {window}", hint="raise --window, or leave the task out"
        )
    kept = [*context, *targets][-(window + 1) :]
    return Row(place, tuple(kept[: -len(targets)]), tuple(targets))


def batches(rows: Iterable[Row], size: int, vocabulary: int, share: bool = True) -> Iterator[Batch]:
    """Rows in passes, the longest first: at most ``size`` sequences, fewer if their logits would exceed LOGITS.

    Equal inputs are read once, whatever their last target; with ``share``, equal contexts too.
    """
    pieces = sorted(_pieces(rows, size, share), key=lambda piece: (len(piece[0].tails) > 1, -piece[0].longest, piece[0].context))
    some: list[tuple[Group, tuple[tuple[Row, ...], ...]]] = []
    for piece in pieces:
        if some and not _fits([group for group, _ in some], piece[0], size, vocabulary):
            yield _batch(some)
            some = []
        some.append(piece)
    if some:
        yield _batch(some)


def _pieces(rows: Iterable[Row], size: int, share: bool) -> Iterator[tuple[Group, tuple[tuple[Row, ...], ...]]]:
    """Groups with the rows of their tails."""
    found: dict[tuple[int, ...], dict[tuple[int, ...], list[Row]]] = {}
    for row in rows:
        found.setdefault(row.context, {}).setdefault(row.tail, []).append(row)
    for context, tails in found.items():
        width = size if share and len(context) >= SHARED else 1
        names = list(tails)
        for start in range(0, len(names), width):
            some = names[start : start + width]
            yield Group(context, tuple(some)), tuple(tuple(tails[tail]) for tail in some)


def _fits(groups: list[Group], more: Group, size: int, vocabulary: int) -> bool:
    """Whether a pass takes one more group: of the same kind, within its sequences and logits."""
    if (len(groups[0].tails) > 1) != (len(more.tails) > 1):
        return False
    tails = [tail for group in [*groups, more] for tail in group.tails]
    return len(tails) <= size and len(tails) * (1 + max(map(len, tails))) * vocabulary <= LOGITS


def _batch(pieces: list[tuple[Group, tuple[tuple[Row, ...], ...]]]) -> Batch:
    return Batch(tuple(group for group, _ in pieces), tuple(rows for _, rows in pieces))
