"""Do errors of neighbouring tensors add up? Measured, not assumed: both quantized together, against each alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.roles import ATTENTION_ROLES, Role
from quantkit.progress import Progress

RUN = [role for role in Role if role in ATTENTION_ROLES or role.value.startswith(("ffn", "expert", "shared"))]  # as a layer runs
LAYERS = 3  # in which pairs are measured, spread over the depth


def neighbours(checkpoint: Checkpoint, names: list[str]) -> list[tuple[str, str]]:
    """Pairs of tensors that follow each other, in some layers: within the layer, and from its last to the next layer's first."""
    order = {role.value: place for place, role in enumerate(RUN)}
    layers: dict[int, list[str]] = {}
    for name in names:
        info = checkpoint.info(name)
        if info.layer is not None and info.role.value in order:
            layers.setdefault(info.layer, []).append(name)
    for members in layers.values():
        members.sort(key=lambda name: order[checkpoint.info(name).role.value])
    numbers = sorted(layers)
    chosen = sorted({numbers[int(i)] for i in np.linspace(0, len(numbers) - 1, min(LAYERS, len(numbers)))}) if numbers else []
    out: list[tuple[str, str]] = []
    for layer in chosen:
        out += pairwise(layers[layer])
        if layer + 1 in layers:
            out.append((layers[layer][-1], layers[layer + 1][0]))
    return out


def measure_neighbours(
    checkpoint: Checkpoint, sensitivity: Sensitivity, fmt: str, divergence: Callable[[dict[str, Any]], float],
    value: Callable[[str, str], Any], progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs whose tensors were both probed in ``fmt``: what they cost alone and together, nats per token.

    divergence: of the model with tensors replaced. value: a tensor as it comes back from a format.
    """
    probed = {
        n: t.formats[fmt].probe_kld for n, t in sensitivity.tensors.items() if fmt in t.formats and t.formats[fmt].probe_kld
    }
    pairs, out = neighbours(checkpoint, list(probed)), []
    task = progress.task("probe neighbours", total=len(pairs), unit="pairs")
    for first, second in pairs:
        together = divergence({name: value(name, fmt) for name in (first, second)})
        out.append(
            {"first": first, "second": second, "format": fmt, "alone": [probed[first], probed[second]], "together": together}
        )
        task.advance()
    task.done()
    return out


def neighbour_rows(roles: dict[str, str], found: list[dict[str, Any]]) -> list[list[str]]:
    """One row for each pair of roles: how many pairs, and what both cost together as a share of the sum of each alone.

    roles: role of every tensor.
    """
    shares: dict[tuple[str, str], list[float]] = {}
    for pair in found:
        key = roles[pair["first"]], roles[pair["second"]]
        shares.setdefault(key, []).append(pair["together"] / sum(pair["alone"]))
    return [
        [f"{first} and {second}", str(len(s)), f"{np.median(s):.2f} ({min(s):.2f} to {max(s):.2f})"]
        for (first, second), s in shares.items()
    ]
