"""Which probes are worth their time: those whose answer could change plans the most."""

from __future__ import annotations

import math

from quantkit.analysis.predict import balanced_formats, probe_formats
from quantkit.analysis.sensitivity import Sensitivity, TensorSensitivity
from quantkit.checkpoint import Checkpoint
from quantkit.formats import get_format

Probe = tuple[str, str]  # tensor and format
DOUBT = 1.5  # an estimate may be off by this factor either way (docs/log.md: 1.08 in the median, 0.4 to 1.5 at worst)
WORK = 4e13  # multiplications of all probes together: some five minutes on two cores
FEWEST = 16


def choose_probes(checkpoint: Checkpoint, sensitivity: Sensitivity, tokens: int, sizes: tuple[float, ...]) -> list[Probe]:
    """All probes of a small model; of a larger one those of most value, as many as WORK allows. In the model's order.

    tokens: of each probe. sizes: bits per weight of the plans that count. Predictions must have been filled in.
    """
    found = [(name, fmt) for name, t in sensitivity.tensors.items() for fmt in probe_formats(checkpoint.info(name), t.formats)]
    most = max(FEWEST, int(WORK / (tokens * checkpoint.n_weights)))
    if len(found) <= most:
        return found
    values = probe_values(checkpoint, sensitivity, sizes)
    best = set(sorted(found, key=lambda probe: -values.get(probe, 0.0))[:most])
    return [probe for probe in found if probe in best]


def probe_values(checkpoint: Checkpoint, sensitivity: Sensitivity, sizes: tuple[float, ...]) -> dict[Probe, float]:
    """What plans lose, as a share of their predicted divergence, if a tensor's estimate is off by DOUBT and nobody looks.

    At the price of a bit of each size a tensor takes the format with the least cost + price · bits. Were its costs
    DOUBT times as large or as small, another format would be better: that difference is what a probe can save.
    """
    out: dict[Probe, float] = {}
    for bpw in sizes:
        formats, price = balanced_formats(sensitivity, bpw)
        total = sum(sensitivity.tensors[name].formats[fmt].predicted_kld for name, fmt in formats.items())
        for name, chosen in formats.items():
            tensor = sensitivity.tensors[name]
            nearest = min(
                probe_formats(checkpoint.info(name), tensor.formats), key=lambda f: abs(get_format(f).bpw() - get_format(chosen).bpw())
            )  # fmt: skip
            lost = sum(_regret(tensor, chosen, price, factor) for factor in (DOUBT, 1 / DOUBT))
            out[name, nearest] = out.get((name, nearest), 0.0) + lost / max(total, 1e-30)
    return out


def _regret(tensor: TensorSensitivity, chosen: str, price: float, factor: float) -> float:
    """Nats lost by ``chosen`` against the best format, were all costs ``factor`` times as large."""
    weights = math.prod(tensor.shape)

    def loss(fmt: str) -> float:
        return factor * tensor.formats[fmt].predicted_kld + price * get_format(fmt).bpw() * weights

    return loss(chosen) - min(map(loss, tensor.formats))
