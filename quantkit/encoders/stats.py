"""What calibration knows about the inputs of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Moments:
    """Second moments E[x xᵀ] of one matrix's inputs, read when needed.

    key: says which; equal keys mean equal moments. read: gives float32 (blocks, width, width), diagonal blocks that
    together cover all columns (one block unless the rows are very long).
    """

    key: str
    read: Callable[[], npt.NDArray[np.float32]] = field(compare=False)


class MomentSource(Protocol):
    """Where moments come from, by tensor and expert."""

    key: str

    def get(self, name: str, expert: int = 0) -> Moments | None:
        """Moments of one expert's inputs, None where nothing is known."""


@dataclass
class TensorStats:
    """Second moments of the inputs of one tensor.

    sum_squares: float32 (experts, columns), the sum of x² over tokens; counts: float32 (experts,), tokens
    seen by each expert (one entry for an ordinary matrix).
    """

    sum_squares: npt.NDArray[np.float32]
    counts: npt.NDArray[np.float32]

    def importance(self, expert: int = 0) -> npt.NDArray[np.float32] | None:
        """Mean of x² for each column, float32 (columns,), or None if the expert saw no token."""
        if self.counts[expert] <= 0:
            return None
        return (self.sum_squares[expert] / self.counts[expert]).astype(np.float32)

    @property
    def uncovered(self) -> list[int]:
        """Experts that no calibration token reached."""
        return [int(e) for e in np.flatnonzero(self.counts <= 0)]


@dataclass
class ActivationStats:
    """Statistics by GGUF tensor name, and where they come from. moments: full second moments, where they were kept."""

    tensors: dict[str, TensorStats] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512
    identity: str = ""
    moments: MomentSource | None = None

    def moments_of(self, name: str, expert: int = 0) -> Moments | None:
        """Second moments of one expert's inputs, None where they were not kept."""
        return None if self.moments is None else self.moments.get(name, expert)

    def covers(self, name: str) -> bool:
        """Whether every expert of a tensor has statistics."""
        return name in self.tensors and not self.tensors[name].uncovered

    def importance(self, name: str, expert: int = 0) -> npt.NDArray[np.float32] | None:
        """Mean of x² for the columns of one tensor's expert, None where nothing is known."""
        stats = self.tensors.get(name)
        return None if stats is None else stats.importance(expert)
