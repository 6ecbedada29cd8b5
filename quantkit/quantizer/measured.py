"""How far a finished file is from its model, so that every prediction of a plan stands beside what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quantkit.analysis.run import PROBE_WEIGHTS
from quantkit.analysis.texts import CalibrationText
from quantkit.analysis.windows import file_windows
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.metrics import kl_divergence
from quantkit.modeling.blocks import Blocks
from quantkit.modeling.products import fast_float32
from quantkit.progress import Progress

if TYPE_CHECKING:
    import torch

BATCH = 4  # windows that run together


@dataclass(frozen=True)
class Measured:
    """kld: mean KL divergence, nats per token; error: standard error of the mean; tokens: behind it."""

    kld: float
    error: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.kld:.4g} ± {self.error:.1g} nats/token on {self.tokens:,} tokens of calibration text set apart"


def measure(checkpoint: Checkpoint, path: Path, text: CalibrationText, progress: Progress) -> Measured:
    """KL divergence of a file on windows that neither statistics nor probes saw; fewer for a model too large for probes."""
    windows = file_windows(checkpoint, text, large=checkpoint.n_weights > PROBE_WEIGHTS)
    found = divergences(checkpoint, open_checkpoint(path), windows, progress)
    return Measured(float(found.mean()), float(found.std() / max(len(found), 2) ** 0.5), windows.size)


@fast_float32()
def divergences(
    original: Checkpoint, other: Checkpoint, windows: npt.NDArray[np.int64], progress: Progress
) -> npt.NDArray[np.float32]:
    """KL divergence of every token between two checkpoints of one architecture, float32 (tokens,).

    windows: token ids (n, window). One decoder layer, then one head, is in memory at a time.
    """
    import torch

    batches = [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]
    task = progress.task("measure the file", total=2 * windows.size, unit="tokens")
    with torch.inference_mode():
        reference, candidate = (_hidden(checkpoint, batches) for checkpoint in (original, other))
        task.advance(windows.size)
        with Blocks(original).head() as head:
            expected = [[head(window).log_softmax(-1) for window in states] for states in reference]
        with Blocks(other).head() as head:
            found = [
                kl_divergence(logp, head(window)).numpy()
                for ours, states in zip(expected, candidate, strict=True)
                for logp, window in zip(ours, states, strict=True)
            ]
        task.advance(windows.size)
    task.done()
    return np.concatenate(found)


def _hidden(checkpoint: Checkpoint, batches: list[npt.NDArray[np.int64]]) -> list[torch.Tensor]:
    """Hidden states after the last layer."""
    blocks = Blocks(checkpoint)
    states = [blocks.embed(batch) for batch in batches]
    for index in range(blocks.n_layers):
        with blocks.layer(index) as layer:
            states = [layer(batch) for batch in states]
    return states
