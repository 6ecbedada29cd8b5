"""Orders of channels that a group may take, for the real encoders to choose from.

Two ideas, opposite to each other. Channels that are large in the same rows share a block: its scale then fits all of
them. And channels of very different importance share a block: the encoder can then favour the few that matter. Which
wins depends on the format (docs/fold.md has numbers), so nothing is decided here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.quantizer.fold_groups import Group, Ints
from quantkit.quantizer.fold_sample import Sample

SMALLEST_BLOCK = 16  # columns that share a scale in K-quants of 2, 3 and 6 bits
TOGETHER = 4  # columns that share a row of a code book
Floats = npt.NDArray[np.float64]


def orders(group: Group, sample: Sample) -> list[Ints]:
    """Candidates: which old channel stands where, int32 (channels,); none if the group has an order that must stay."""
    if group.run < 2 * SMALLEST_BLOCK or group.run % SMALLEST_BLOCK:
        return []
    inputs, weights = sample.sizes()
    weight = inputs * weights
    found = [_in_runs(group, np.argsort(pattern(sample), kind="stable"))]
    for together in (1, TOGETHER):
        found.append(_dealt(group, weight, together))
    return found


def pattern(sample: Sample) -> Floats:
    """A number for each channel: alike for channels whose weights are large in the same rows. float64 (channels,).

    The leading singular vector of the logarithms of the weights without their row and column means.
    """
    logs = np.log(sample.weights.astype(np.float64) ** 2 + 1e-6 * np.square(sample.weights, dtype=np.float64).mean(0) + 1e-300)
    logs -= logs.mean(0)
    logs -= logs.mean(1, keepdims=True)
    leading = logs.T @ np.linalg.eigh(logs @ logs.T)[1][:, -1]
    leading *= np.sign(leading[np.argmax(np.abs(leading))]) or 1.0
    return np.asarray(np.bincount(sample.channel, leading), np.float64)


def _in_runs(group: Group, ranked: npt.NDArray[np.int64]) -> Ints:
    """A ranking of all channels, kept within each run."""
    run = ranked // group.run
    return np.concatenate([ranked[run == i] for i in range(group.channels // group.run)]).astype(np.int32)


def _dealt(group: Group, weight: Floats, together: int) -> Ints:
    """Channels by weight, dealt to the blocks there and back like cards, ``together`` neighbours at a time."""
    ranked = _in_runs(group, np.argsort(-weight, kind="stable")).reshape(-1, group.run)
    hands = ranked.reshape(len(ranked), SMALLEST_BLOCK // together, group.run // SMALLEST_BLOCK, together).copy()
    hands[:, 1::2] = hands[:, 1::2, ::-1]
    return np.ascontiguousarray(hands.transpose(0, 2, 1, 3)).reshape(-1).astype(np.int32)
