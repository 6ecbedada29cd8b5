"""Measuring instead of estimating: single tensors, neighbours and whole plans, or groups where the model is too large."""

from __future__ import annotations

import numpy as np

from quantkit.analysis.errors import Decoded, decode_after_encode
from quantkit.analysis.group_probes import measure_groups
from quantkit.analysis.neighbours import measure_neighbours
from quantkit.analysis.predict import balanced_formats, fill_all, fill_predictions, fit_composition, summed_cost
from quantkit.analysis.probe_choice import choose_probes
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.analysis.texts import CalibrationText
from quantkit.analysis.windows import LARGE_TOKENS, probe_windows, spread
from quantkit.checkpoint import Checkpoint
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import get_format
from quantkit.progress import Progress
from quantkit.threads import map_threads

COMPOSITION_BPW = (2.1, 2.8, 3.5, 4.25, 5.25)  # of the plans that tell how costs add up
KEPT_WEIGHTS = 1 << 24  # decoded tensors of smaller models are kept for the probes: some ten copies in float32
NEIGHBOUR_FORMAT = "Q4_K"


def decoded(checkpoint: Checkpoint, stats: ActivationStats, name: str, fmt: str, method: str | None = None) -> np.ndarray:
    """A tensor as it comes back from a format, in its own shape, float32."""
    info = checkpoint.info(name)
    weights = checkpoint.read(name).reshape(info.experts, -1, info.columns)

    def part(expert: int) -> np.ndarray:
        return decode_after_encode(
            weights[expert], stats.importance(name, expert), get_format(fmt), name, method, stats.moments_of(name, expert),
            stats.outputs_of(name, expert, 0, len(weights[expert])),
        )  # fmt: skip

    return np.stack(map_threads(part, range(info.experts))).reshape(info.shape)


class Prober:
    """Measures the tensors of an analysis on windows that its statistics did not use, and fills in what it predicts."""

    def __init__(
        self, checkpoint: Checkpoint, stats: ActivationStats, sensitivity: Sensitivity, text: CalibrationText, known: Decoded
    ) -> None:
        """known: tensors decoded already. Holds the model in memory."""
        from quantkit.analysis.probes import ProbeModel

        self._checkpoint, self._stats, self._sensitivity, self._known = checkpoint, stats, sensitivity, known
        self._windows = probe_windows(checkpoint, text)
        self._model = ProbeModel(checkpoint, self._windows)

    def run(self, progress: Progress) -> None:
        """Single tensors, then neighbours, then whole plans."""
        tensors = self._sensitivity.tensors
        fill_all(tensors.values())
        todo = choose_probes(self._checkpoint, self._sensitivity, self._windows.size, COMPOSITION_BPW)
        task = progress.task("probe tensors", total=len(todo), unit="probes")
        for name, fmt in todo:
            tensors[name].formats[fmt].probe_kld = self._model.divergence({name: self._value(name, fmt)})
            task.advance()
        task.done()
        fill_all(tensors.values())
        self._sensitivity.neighbours = measure_neighbours(
            self._checkpoint, self._sensitivity, NEIGHBOUR_FORMAT, self._model.divergence, self._value, progress
        )
        self._compose(progress)

    def _value(self, name: str, fmt: str, keep: bool = False) -> np.ndarray:
        key = (name, fmt, self._sensitivity.tensors[name].formats[fmt].method)
        value = self._known[key] if key in self._known else decoded(self._checkpoint, self._stats, *key)
        if keep and self._checkpoint.n_weights <= KEPT_WEIGHTS:
            self._known[key] = value
        return value

    def _compose(self, progress: Progress) -> None:
        """How single costs add up: whole plans of several sizes, measured on the same windows."""
        predicted, measured = [], []
        task = progress.task("probe plans", total=len(COMPOSITION_BPW), unit="plans")
        for bpw in COMPOSITION_BPW:
            formats, _ = balanced_formats(self._sensitivity, bpw)
            values = {name: self._value(name, fmt, keep=True) for name, fmt in formats.items()}
            predicted.append(summed_cost(self._sensitivity, formats))
            measured.append(self._model.divergence(values))
            task.advance()
        task.done()
        self._sensitivity.composition = fit_composition(predicted, measured)


def probe_groups(
    checkpoint: Checkpoint, stats: ActivationStats, sensitivity: Sensitivity, text: CalibrationText, progress: Progress
) -> None:
    """The same for a model that is too large: groups of tensors scale the estimates of their members."""
    groups, whole = measure_groups(checkpoint, stats, sensitivity.tensors, spread(text.dev, LARGE_TOKENS), progress)
    points: dict[str, dict[str, tuple[float, float]]] = {}  # (estimated, measured) of ggml's search, by tensor and format
    for group in groups:
        for name, fmt in group.tensors.items():
            estimated = sensitivity.tensors[name].formats[fmt].search_kld or 0.0
            if estimated > 0:
                points.setdefault(name, {})[fmt] = (estimated, group.ratio * estimated)
    for name, tensor in sensitivity.tensors.items():
        fill_predictions(tensor, list(points.get(name, {}).values()))
    predicted = [
        sum(points[name][fmt][1] for name, fmt in everything.tensors.items() if fmt in points.get(name, {}))
        for everything in whole
    ]
    sensitivity.composition = fit_composition(predicted, [everything.measured for everything in whole])
    sensitivity.groups = [group.to_json() for group in (*groups, *whole)]
