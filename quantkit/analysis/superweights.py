"""Super weights: single weights whose removal destroys a model (Yu et al. 2024, arXiv 2411.07191).

They show in one forward pass: a down projection whose input and output both spike in one channel. Row and
column of the weight are those channels. We ask in addition that the one product explains the spike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.analysis.calibration import LinearFacts
from quantkit.checkpoint import Checkpoint, Role

INPUT_SPIKE = 30.0  # peak ÷ root mean square of the input
OUTPUT_SPIKE = 30.0  # the same of the output
EXPLAINED = 0.5  # share of the output's peak that the single product must explain


@dataclass(frozen=True)
class SuperWeight:
    """One super weight: where it is, its value, and how far input and output stick out."""

    tensor: str
    layer: int
    row: int
    column: int
    value: float
    input_spike: float
    output_spike: float


def find_super_weights(checkpoint: Checkpoint, facts: dict[str, LinearFacts]) -> list[dict[str, Any]]:
    """Super weights of the dense and shared down projections, strongest first (dictionaries for JSON)."""
    found = []
    for name, fact in facts.items():
        info = checkpoint.tensors.get(name)
        if info is None or info.role not in (Role.FFN_DOWN, Role.SHARED_DOWN) or info.layer is None:
            continue
        into, out = fact.input_peak / max(fact.input_rms, 1e-30), fact.output_peak / max(fact.output_rms, 1e-30)
        if into < INPUT_SPIKE or out < OUTPUT_SPIKE:
            continue
        row, column = fact.output_channel, fact.input_channel
        value = float(checkpoint.read_rows(name, row, row + 1)[0, column])
        if abs(value) * fact.input_peak >= EXPLAINED * fact.output_peak:
            found.append(SuperWeight(name, info.layer, row, column, value, into, out))
    return [asdict(weight) for weight in sorted(found, key=lambda w: -w.output_spike)]
