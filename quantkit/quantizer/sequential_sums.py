"""What ``sequential`` adds up over the tokens of a text, and the weights and statistics that follow from it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quantkit.analysis.moments import column_blocks, same_input
from quantkit.checkpoint import TensorInfo
from quantkit.encoders.ldlq import DAMPING
from quantkit.encoders.stats import ActivationStats, Moments, MomentSource, TensorStats
from quantkit.quantizer.sequential_inputs import JOINS, Pairs

if TYPE_CHECKING:
    import torch

LARGEST_BYTES = 1 << 30  # matrices of one tensor, or of as many of its experts as are encoded together


class Sums:
    """Moments of one tensor's inputs in both copies, by expert and diagonal block of columns."""

    def __init__(self, info: TensorInfo, experts: range = range(1)) -> None:
        """experts: those of the tensor that it is about."""
        import torch

        self.key = uuid.uuid4().hex
        self.experts = experts
        blocks = column_blocks(info.columns)
        width = info.columns // blocks
        self.counts = np.zeros(len(experts))
        self.own = torch.zeros(len(experts), blocks, width, width)  # y yᵀ
        self.lacking = torch.zeros(len(experts), blocks, width, width)  # (x − y) yᵀ
        self.residual: torch.Tensor | None = None  # d yᵀ

    def add(self, pairs: Pairs) -> None:
        """Tokens of one expert."""
        import torch

        x, y, blocks, place = pairs.original, pairs.quantized, self.own.shape[1], self.experts.index(pairs.expert)
        difference, width = x - y, self.own.shape[2]
        for block in range(blocks):
            part = slice(block * width, (block + 1) * width)
            self.own[place, block].addmm_(y[:, part].T, y[:, part])
            self.lacking[place, block].addmm_(difference[:, part].T, y[:, part])
            if pairs.residual is not None:
                if self.residual is None:
                    rows = pairs.residual.shape[1]
                    self.residual = torch.zeros(*self.own.shape[:2], rows, width)
                self.residual[place, block].addmm_(pairs.residual.T, y[:, part], alpha=1 / blocks)
        self.counts[place] += len(y)

    def target(self, weight: npt.NDArray[np.float32], expert: int) -> npt.NDArray[np.float32]:
        """W* of one expert, float32 (rows, columns); the weight itself where there were too few tokens to tell."""
        import scipy.linalg

        out = weight.copy()
        width, place = self.own.shape[2], self.experts.index(expert)
        if not self._enough(expert):
            return out
        for block in range(self.own.shape[1]):
            part = slice(block * width, (block + 1) * width)
            own = self.own[place, block].double().numpy()
            missing = weight[:, part] @ self.lacking[place, block].numpy()
            if self.residual is not None:
                missing = missing + self.residual[place, block].numpy()
            own[np.diag_indices(width)] += DAMPING * np.trace(own) / width
            factor = scipy.linalg.cho_factor(own, lower=True)
            out[:, part] += scipy.linalg.cho_solve(factor, missing.T.astype(np.float64)).T.astype(np.float32)
        return out

    def _enough(self, expert: int) -> bool:
        """Whether there were tokens enough to tell: at least one for each column of a matrix."""
        return bool(self.counts[self.experts.index(expert)] >= self.own.shape[2])

    def stats(self, known: ActivationStats, info: TensorInfo) -> ActivationStats:
        """Statistics of the tensor in the quantized copy; ``known`` ones for experts that saw too little."""
        squares, counts = np.zeros((info.experts, info.columns)), np.zeros(info.experts)
        for place, expert in enumerate(self.experts):
            squares[expert] = np.concatenate([np.diag(block) for block in self.own[place].numpy()])
            counts[expert] = self.counts[place]
            if not self._enough(expert):
                found = known.importance(info.name, expert)
                squares[expert], counts[expert] = (0, 0) if found is None else (found, 1)
        entry = TensorStats(squares.astype(np.float32), counts.astype(np.float32))
        return replace(known, tensors={info.name: entry}, moments=_Moments(self.key, self, known.moments))

    def moments(self, expert: int) -> Moments | None:
        """E[y yᵀ] of one expert."""
        if not self._enough(expert):
            return None
        place = self.experts.index(expert)
        count = np.float32(self.counts[place])
        return Moments(f"{self.key} {expert}", lambda: np.asarray(self.own[place].numpy() / count, np.float32))


def add_up(sums: dict[str, Sums], pairs: Iterable[Pairs]) -> None:
    """Add up the pairs of a batch; tensors with the same inputs come to share their sums."""
    last: Pairs | None = None
    for pair in pairs:
        if last is not None and pair.residual is None and same_input(last.quantized, pair.quantized):
            sums[pair.name] = sums[last.name]
            continue
        sums[pair.name].add(pair)
        last = pair


def expert_ranges(info: TensorInfo) -> list[range]:
    """A tensor's experts in parts whose matrices may be held in memory together; none if one expert's are too large."""
    blocks = column_blocks(info.columns)
    residual = info.rows // info.experts * info.columns if info.role in JOINS else 0
    together = LARGEST_BYTES // (4 * (2 * info.columns * (info.columns // blocks) + residual))
    return [range(i, min(i + together, info.experts)) for i in range(0, info.experts, together)] if together else []


@dataclass
class _Moments:
    """A MomentSource: inputs as the quantized copy gives them, outputs as the analysis measured them."""

    key: str
    sums: Sums
    fallback: MomentSource | None

    def get(self, name: str, expert: int = 0) -> Moments | None:
        return self.sums.moments(expert) or (None if self.fallback is None else self.fallback.get(name, expert))

    def output_rows(self, name: str) -> int:
        return 0 if self.fallback is None else self.fallback.output_rows(name)

    def outputs(self, name: str, expert: int, start: int, stop: int) -> Moments | None:
        return None if self.fallback is None else self.fallback.outputs(name, expert, start, stop)
