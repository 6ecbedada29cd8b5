"""What calibration knows about the inputs of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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

    def output_rows(self, name: str) -> int:
        """Rows that are tied together by the outputs' moments; 0 where those are not known."""

    def outputs(self, name: str, expert: int, start: int, stop: int) -> Moments | None:
        """Moments of the gradients at whole blocks of rows of one expert, None where nothing is known."""


@dataclass
class TensorStats:
    """Second moments of the inputs of one tensor.

    sum_squares: float32 (experts, columns), the sum of x² over tokens; counts: float32 (experts,), tokens
    seen by each expert (one entry for an ordinary matrix). These two are what the calibration text sent there: its
    traffic, and what imatrix.gguf means. gate_squares: float32 (experts,), the sum of the squared gate weights of the
    same tokens. borrowed_squares, borrowed: as the first two, of tokens that experts with too few were shown beyond
    that (analysis/coverage.py). None where nothing is known of them.
    """

    sum_squares: npt.NDArray[np.float32]
    counts: npt.NDArray[np.float32]
    gate_squares: npt.NDArray[np.float32] | None = None
    borrowed_squares: npt.NDArray[np.float32] | None = None
    borrowed: npt.NDArray[np.float32] | None = None

    def importance(self, expert: int = 0) -> npt.NDArray[np.float32] | None:
        """Mean of x² for each column, float32 (columns,), or None if the expert saw no token."""
        squares, count = self.sum_squares[expert], self.counts[expert]
        if self.borrowed is not None and self.borrowed_squares is not None:
            squares, count = squares + self.borrowed_squares[expert], count + self.borrowed[expert]
        return (squares / count).astype(np.float32) if count > 0 else None

    @property
    def uncovered(self) -> list[int]:
        """Experts of which nothing is known: no calibration token reached them and none was borrowed."""
        seen = self.counts if self.borrowed is None else self.counts + self.borrowed
        return [int(e) for e in np.flatnonzero(seen <= 0)]

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """What part of the squared output enters through each expert, by traffic and gate (by traffic where no gates are known)."""
        weight = np.asarray(self.counts if self.gate_squares is None else self.gate_squares, np.float64)
        return weight / weight.sum() if weight.sum() > 0 else weight

    def routed(self) -> TensorStats:
        """The statistics of the calibration text's own traffic, nothing borrowed: what llama.cpp's tools would read."""
        return replace(self, borrowed_squares=None, borrowed=None)

    def tobytes(self) -> bytes:
        """Everything that ``importance`` depends on."""
        parts = (self.sum_squares, self.counts, self.borrowed_squares, self.borrowed)
        return b"".join(part.tobytes() for part in parts if part is not None)


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

    def routed(self) -> ActivationStats:
        """Without what experts borrowed, for plans that promise llama-quantize's bytes."""
        return replace(self, tensors={name: entry.routed() for name, entry in self.tensors.items()})

    def output_rows(self, name: str) -> int:
        """Rows of a tensor that are encoded together, because the outputs' moments tie them; 0 where none were kept."""
        return 0 if self.moments is None else self.moments.output_rows(name)

    def outputs_of(self, name: str, expert: int, start: int, stop: int) -> Moments | None:
        """Moments of the gradients at rows start … stop of one expert, None where they were not kept.

        start and stop are multiples of ``output_rows`` or the end of the matrix.
        """
        return None if self.moments is None else self.moments.outputs(name, expert, start, stop)

    def covers(self, name: str) -> bool:
        """Whether every expert of a tensor has statistics."""
        return name in self.tensors and not self.tensors[name].uncovered

    def importance(self, name: str, expert: int = 0) -> npt.NDArray[np.float32] | None:
        """Mean of x² for the columns of one tensor's expert, None where nothing is known."""
        stats = self.tensors.get(name)
        return None if stats is None else stats.importance(expert)
