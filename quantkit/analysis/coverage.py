"""Expert coverage: how many tokens each routed expert saw, and more of them for experts that saw too few.

Such an expert is shown, first, all tokens of further text that its router really sends to it; then, if that is not
enough, the tokens that came nearest to being sent: whose router logit for it is the least below the k-th highest. They
count only in the statistics of this expert, apart from its traffic (``TensorStats.borrowed``). What flows on through the
model is always the true routing, and no expert is shown more than an even share of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.moments import TENSOR_BYTES, MomentWriter, column_blocks
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders.stats import ActivationStats
from quantkit.modeling.blocks import Blocks, Routing
from quantkit.progress import Progress

if TYPE_CHECKING:
    import torch

COLUMNS = ["layer", "experts", "wanted", "fewest tokens", "median", "most", "too few", "never", "mean gate", "from further text",
           "nearest misses", "fewest after", "too few after"]  # fmt: skip


@dataclass
class Coverage:
    """What the experts of one layer saw; lists have one entry for each expert.

    tokens: of the calibration text; wanted: how many of them an expert should see at least. routed: tokens of the
    calibration text; gate: mean weight with which the expert's output enters (0 if never). further: tokens of
    further text, nearest: tokens that were nearly routed, both shown only to experts with fewer than wanted. gap: by
    how much, in router logits, the last of those missed the top k.
    """

    layer: int
    tokens: int
    wanted: int
    routed: list[int]
    gate: list[float]
    further: list[int]
    nearest: list[int]
    gap: list[float]

    @property
    def after(self) -> list[int]:
        """Tokens behind each expert's statistics."""
        return [sum(parts) for parts in zip(self.routed, self.further, self.nearest, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """As it is kept in analysis.json."""
        lacking = {
            when: [e for e, count in enumerate(counts) if count < self.wanted]
            for when, counts in (("lacking_before", self.routed), ("lacking_after", self.after))
        }
        return {**asdict(self), "gate": [round(g, 4) for g in self.gate], "gap": [round(g, 3) for g in self.gap], **lacking}


def wanted_tokens(columns: int, tokens: int, k: int, experts: int) -> int:
    """How many tokens an expert should see: one for each column, but no more than an even share of the text.

    columns: of a matrix of second moments, which has no full rank with fewer tokens. Measured: docs/moe.md.
    """
    return max(1, min(columns, tokens * k // experts))


def coverage_rows(coverage: list[dict[str, Any]]) -> list[list[str]]:
    """One row a layer (headed COLUMNS) from ``Coverage.to_json``: what the text gave, what was added, what is there now."""
    rows = []
    for c in coverage:
        after = np.add(np.add(c["routed"], c["further"]), c["nearest"])
        gates = [g for g in c["gate"] if g > 0] or [0.0]
        numbers = [
            len(c["routed"]), c["wanted"], min(c["routed"]), int(np.median(c["routed"])), max(c["routed"]),
            len(c["lacking_before"]), c["routed"].count(0), f"{min(gates):.2f} to {max(gates):.2f}", sum(c["further"]),
            sum(c["nearest"]), int(after.min()), len(c["lacking_after"]),
        ]  # fmt: skip
        rows.append([str(c["layer"]), *(n if isinstance(n, str) else f"{n:,}" for n in numbers)])
    return rows


class Coverer:
    """Watches the routers while calibration runs, and fills up the experts of a layer when its text is through.

    further: gives windows of text that calibration does not use, int64 (n, window).
    """

    def __init__(
        self, blocks: Blocks, stats: ActivationStats, tokens: int, further: Callable[[], npt.NDArray[np.int64]],
        full: MomentWriter | None, progress: Progress, batch: int,
    ) -> None:  # fmt: skip
        self.report: list[Coverage] = []
        self._blocks, self._stats, self._tokens, self._full = blocks, stats, tokens, full
        self._further = _FurtherText(blocks, further, progress, batch)
        self._traffic: _Traffic | None = None

    def watch(self, routing: Routing) -> None:
        """See calibration tokens pass the router of the layer that is running."""
        if self._traffic is None:
            self._traffic = _Traffic(routing, self._tokens, self._blocks.checkpoint)
        self._traffic.add(routing)

    def fill(self, index: int) -> None:
        """After a layer's calibration tokens: note its coverage, and give experts with too few tokens more of them."""
        traffic, self._traffic = self._traffic, None
        if traffic is None:
            return  # a layer without experts
        for name in traffic.names:
            self._stats.tensors[name].gate_squares = traffic.gate_squares.float().numpy()
        counts, none = traffic.counts.tolist(), [0] * len(traffic.counts)
        gate = (traffic.gates / traffic.counts.clamp(min=1)).tolist()
        entry = Coverage(index, self._tokens, traffic.wanted, counts, gate, none, [*none], [0.0] * len(none))
        self.report.append(entry)
        lacking = [e for e, count in enumerate(counts) if count < traffic.wanted]
        if lacking:
            self._borrow(index, traffic, lacking, entry)

    def _borrow(self, index: int, traffic: _Traffic, lacking: list[int], entry: Coverage) -> None:
        blocks, borrowed = self._blocks, _Borrowed(self._blocks.checkpoint, self._stats, self._full)

        def collect(routing: Routing) -> None:
            for expert in lacking:
                found = (routing.chosen == expert).any(1)
                if found.any():
                    blocks.show_expert(index, expert, routing.x[found], borrowed)
                    entry.further[expert] += int(found.sum())
            traffic.nearest.add(routing, lacking, traffic.wanted)

        self._further.reach(index)
        with blocks.layer(index, routing=collect) as layer:
            self._further.run(layer)
            for expert in lacking:
                missing = traffic.wanted - entry.routed[expert] - entry.further[expert]
                x, gaps = traffic.nearest.take(expert, max(missing, 0))
                if len(x):
                    blocks.show_expert(index, expert, x, borrowed)
                    entry.nearest[expert], entry.gap[expert] = len(x), float(gaps.max())


class _Traffic:
    """Tokens and gate weights by expert of one layer, and the tokens that nearly reached experts which lack some."""

    def __init__(self, routing: Routing, tokens: int, checkpoint: Checkpoint) -> None:
        import torch

        experts = routing.logits.shape[1]
        self.names = routing.names
        widths = [matrix_width(checkpoint.info(name)) for name in self.names]
        self.wanted = wanted_tokens(max(widths), tokens, routing.chosen.shape[1], experts)
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.gates = torch.zeros(experts, dtype=torch.float64)
        self.gate_squares = torch.zeros(experts, dtype=torch.float64)
        self.nearest = _NearestMisses()

    def add(self, routing: Routing) -> None:
        experts, weights = routing.chosen.reshape(-1), routing.weights.reshape(-1).double()
        self.counts += experts.bincount(minlength=len(self.counts))
        self.gates.index_add_(0, experts, weights)
        self.gate_squares.index_add_(0, experts, weights.square())
        lacking = (self.counts < self.wanted).nonzero().reshape(-1).tolist()
        self.nearest.add(routing, lacking, self.wanted)


class _NearestMisses:
    """Of all tokens seen, those that missed some expert by the least. Never holds more than each expert could use."""

    def __init__(self) -> None:
        self._x: torch.Tensor | None = None  # (tokens, width)
        self._gaps: torch.Tensor | None = None  # (tokens, experts): k-th highest logit − the expert's; inf where routed

    def add(self, routing: Routing, experts: list[int], limit: int) -> None:
        """Tokens that pass the router; ``limit`` of them are kept for each of ``experts``."""
        import torch

        least = routing.logits.gather(1, routing.chosen).min(1, keepdim=True).values
        gaps = (least - routing.logits).scatter(1, routing.chosen, torch.inf)
        if self._x is None or self._gaps is None:
            x = routing.x
        else:
            x, gaps = torch.cat([self._x, routing.x]), torch.cat([self._gaps, gaps])
        best = gaps[:, experts].topk(min(limit, len(gaps)), dim=0, largest=False, sorted=False).indices.unique()
        self._x, self._gaps = x[best], gaps[best]

    def take(self, expert: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``count`` tokens (n, width) nearest to one expert, in the order of the text, and their gaps."""
        assert self._x is not None and self._gaps is not None
        gaps = self._gaps[:, expert]
        best = gaps.argsort(stable=True)[:count]
        best = best[gaps[best].isfinite()].sort().values
        return self._x[best], gaps[best]


class _FurtherText:
    """Further text on its way through the layers. It is not even read while nothing lacks, and waits between layers."""

    def __init__(self, blocks: Blocks, windows: Callable[[], npt.NDArray[np.int64]], progress: Progress, batch: int) -> None:
        self._blocks, self._windows, self._progress, self._batch = blocks, windows, progress, batch
        self._hidden: list[torch.Tensor] | None = None
        self._at = 0

    def reach(self, index: int) -> None:
        """Bring the text in front of layer ``index``, one layer in memory at a time."""
        if self._hidden is None:
            ids = self._windows()
            self._hidden = [self._blocks.embed(ids[i : i + self._batch]) for i in range(0, len(ids), self._batch)]
        while self._hidden and self._at < index:
            with self._blocks.layer(self._at) as layer:
                self.run(layer)

    def run(self, layer: Any) -> None:
        """Take the text through the layer that it is in front of."""
        assert self._hidden is not None
        total = sum(states.shape[0] * states.shape[1] for states in self._hidden)
        task = self._progress.task(f"further text, layer {self._at}", total=total, unit="tokens")
        for i, states in enumerate(self._hidden):
            self._hidden[i] = layer(states)
            task.advance(states.shape[0] * states.shape[1])
        task.done()
        self._at += 1


class _Borrowed:
    """An Observer that adds to what experts borrowed, and to their full moments where each expert has its own."""

    def __init__(self, checkpoint: Checkpoint, stats: ActivationStats, full: MomentWriter | None) -> None:
        self._checkpoint, self._stats, self._full = checkpoint, stats, full

    def see(self, name: str, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        info, entry = self._checkpoint.info(name), self._stats.tensors[name]
        if entry.borrowed is None or entry.borrowed_squares is None:
            entry.borrowed_squares, entry.borrowed = np.zeros_like(entry.sum_squares), np.zeros_like(entry.counts)
        entry.borrowed_squares[expert] += x.square().sum(0).double().numpy()
        entry.borrowed[expert] += len(x)
        if self._full is not None and kept_apart(info):
            self._full.add(name, expert, x)


def matrix_width(info: TensorInfo) -> int:
    """Columns of one matrix of second moments: all of a tensor's, unless its rows are very long."""
    return info.columns // column_blocks(info.columns)


def kept_apart(info: TensorInfo) -> bool:
    """Whether MomentWriter keeps a matrix for each expert: one shared by all must not change for a few."""
    return info.experts * info.columns * matrix_width(info) * 4 <= TENSOR_BYTES
