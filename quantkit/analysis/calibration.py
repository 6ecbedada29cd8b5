"""Calibration: the model reads text block by block while every linear map's input is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from quantkit.analysis.activations import fp8, int8, relative_error
from quantkit.analysis.coverage import Coverage, Coverer
from quantkit.analysis.moments import MomentWriter, same_input
from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import Checkpoint
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import CalibrationError
from quantkit.modeling.blocks import Blocks
from quantkit.progress import Progress

if TYPE_CHECKING:
    import torch

BATCH = 4  # windows that run together
SAMPLE = 64  # tokens on which the cost of quantized activations is measured


@dataclass
class LinearFacts:
    """What calibration saw at one linear map, beyond second moments.

    input_peak, output_peak: largest magnitude; input_channel, output_channel: where; input_rms,
    output_rms: typical size; int8, fp8: relative error of the outputs with INT8 (per token) or FP8 E4M3
    (per tensor) activations.
    """

    input_peak: float = 0.0
    input_channel: int = 0
    input_rms: float = 0.0
    output_peak: float = 0.0
    output_channel: int = 0
    output_rms: float = 0.0
    int8: float = 0.0
    fp8: float = 0.0


@dataclass
class Calibration:
    """Statistics for the encoders and facts for the analysis. coverage: one entry for each layer with routed experts."""

    stats: ActivationStats
    facts: dict[str, LinearFacts] = field(default_factory=dict)
    coverage: list[Coverage] = field(default_factory=list)


class _Moments:
    """An Observer that sums x² per channel and expert and keeps peaks."""

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, full: MomentWriter | None) -> None:
        self._full = full
        self._checkpoint = checkpoint
        self._out = calibration
        self._last: tuple[torch.Tensor, np.ndarray] | None = None

    def see(self, name: str, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            return
        entry = self._out.stats.tensors.get(name)
        if entry is None:
            shape = (info.experts, info.columns)
            entry = TensorStats(np.zeros(shape, np.float64), np.zeros(info.experts, np.float64))  # type: ignore[arg-type]
            self._out.stats.tensors[name] = entry
        if self._last is None or not same_input(self._last[0], x):
            self._last = (x, x.square().sum(0, dtype=x.dtype).double().numpy())
        squares = self._last[1]
        if not np.isfinite(squares).all():
            channel = int(np.argmin(np.isfinite(squares)))
            raise CalibrationError(
                f"the input of {name} is not finite in channel {channel}", hint="a weight before it is damaged"
            )
        if self._full is not None:
            self._full.add(name, expert, x)
        entry.sum_squares[expert] += squares
        entry.counts[expert] += len(x)
        self._peaks(self._out.facts.setdefault(name, LinearFacts()), x, y, weight)

    @staticmethod
    def _peaks(facts: LinearFacts, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        for kind, value in (("input", x), ("output", y)):
            position = int(value.abs().argmax())
            peak = float(value.reshape(-1)[position].abs())
            if peak > getattr(facts, f"{kind}_peak"):
                setattr(facts, f"{kind}_peak", peak)
                setattr(facts, f"{kind}_channel", position % value.shape[-1])
        if facts.input_rms == 0.0:
            facts.input_rms = float(x.square().mean().sqrt())
            facts.output_rms = float(y.square().mean().sqrt())
            sample = x[:SAMPLE]
            facts.int8 = relative_error(sample, int8(sample, "token"), weight.float())
            facts.fp8 = relative_error(sample, fp8(sample, "tensor"), weight.float())


def calibrate(
    checkpoint: Checkpoint, text: CalibrationText, progress: Progress, full: MomentWriter | None = None, half: bool = False
) -> Calibration:
    """Second moments of every linear input over the ``train`` windows, one decoder layer in memory.

    Experts that see too few tokens of them get statistics from further text and near misses (coverage.py).
    full: keeps the whole matrices E[x xᵀ] as well, not only the diagonal. half: BF16 matrices multiply in BF16.

    Raises CalibrationError if an activation is not finite.
    """
    import torch

    result = Calibration(
        ActivationStats(datasets=text.names, chunks=len(text.train), chunk_size=text.window, identity=checkpoint.identity)
    )
    observer = _Moments(checkpoint, result, full)
    blocks = Blocks(checkpoint, half=half)
    cover = Coverer(blocks, result.stats, text.train.size, text.further, full, progress, BATCH)
    batches = [text.train[i : i + BATCH] for i in range(0, len(text.train), BATCH)]
    with torch.inference_mode():
        hidden = [blocks.embed(batch) for batch in batches]
        task = progress.task("calibrate", total=(blocks.n_layers + 1) * text.train.size, unit="tokens")
        for index in range(blocks.n_layers):
            with blocks.layer(index, observer, cover.watch) as layer:
                for i, states in enumerate(hidden):
                    hidden[i] = layer(states)
                    task.advance(states.shape[0] * states.shape[1])
            cover.fill(index)
            if full is not None:
                full.flush()
        with blocks.head(observer) as head:
            for states in hidden:
                for window in states:  # the logits of one window at a time
                    head(window)
                task.advance(states.shape[0] * states.shape[1])
        task.done()
    result.stats.moments = full.close() if full is not None else None
    result.coverage = cover.report
    for entry in result.stats.tensors.values():
        _single_precision(entry)
    return result


def _single_precision(entry: TensorStats) -> None:
    """Sums were taken in float64."""
    entry.sum_squares, entry.counts = entry.sum_squares.astype(np.float32), entry.counts.astype(np.float32)
    if entry.borrowed is not None and entry.borrowed_squares is not None:
        entry.borrowed_squares, entry.borrowed = entry.borrowed_squares.astype(np.float32), entry.borrowed.astype(np.float32)
