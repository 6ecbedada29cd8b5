"""Which windows of the calibration text each measurement reads, and how many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import Checkpoint

FISHER_TOKENS = 8192  # behind the rows of the outputs, and at most an eighth of the text: three passes each
MOMENT_TOKENS = 32768  # behind their full moments, and at most half of the text
FEWEST_FISHER_TOKENS = 2048
SCHEME_TOKENS = 2048
LARGE_TOKENS = 1024  # of schemes, groups and finished files, for models that are not probed
PROBE_TOKENS = 4096
REFIT_TOKENS = 12288
PROBE_LOGITS = 1 << 28  # probed positions × vocabulary held in memory at most

Windows = npt.NDArray[np.int64]


def spread(windows: Windows, tokens: int) -> Windows:
    """About ``tokens`` tokens of windows (n, window), spread evenly."""
    count = max(1, min(len(windows), tokens // windows.shape[1]))
    return windows[np.unique(np.linspace(0, len(windows) - 1, count).astype(int))]


def fisher_windows(text: CalibrationText, full: bool) -> Windows:
    """Windows behind the Fisher information. full: of whole matrices at the outputs, not only of rows."""
    most = min(MOMENT_TOKENS, text.train.size // 2) if full else min(FISHER_TOKENS, text.train.size // 8)
    return spread(text.train, max(FEWEST_FISHER_TOKENS, most))


def scheme_windows(text: CalibrationText, large: bool) -> Windows:
    """Windows on which quantized activations and caches are measured."""
    return spread(text.dev, LARGE_TOKENS if large else SCHEME_TOKENS)


def probe_windows(checkpoint: Checkpoint, text: CalibrationText) -> Windows:
    """Windows that probes are measured on: as many as their logits leave room for."""
    return spread(text.dev, with_logits(checkpoint, text.window, PROBE_TOKENS))


def file_windows(checkpoint: Checkpoint, text: CalibrationText, large: bool) -> Windows:
    """Windows that a finished file is measured on, of those of ``refit_windows``."""
    return spread(refit_windows(checkpoint, text), with_logits(checkpoint, text.window, LARGE_TOKENS if large else PROBE_TOKENS))


def with_logits(checkpoint: Checkpoint, window: int, tokens: int) -> int:
    """At most so many tokens that the logits of all of them may be held in memory; a window at least."""
    return min(tokens, max(PROBE_LOGITS // int(checkpoint.config["vocab_size"]), window))


def refit_windows(checkpoint: Checkpoint, text: CalibrationText) -> Windows:
    """Windows that neither the statistics nor the probes saw, int64 (n, window), at most REFIT_TOKENS tokens."""
    probed = {row.tobytes() for row in probe_windows(checkpoint, text)}
    rest = [row for row in text.dev if row.tobytes() not in probed]
    return spread(np.array(rest), REFIT_TOKENS) if rest else text.dev
