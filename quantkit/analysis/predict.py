"""From measured points to the cost the planner uses: probes scale the Fisher estimate of every format."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from quantkit.analysis.sensitivity import FormatCost, Sensitivity, TensorSensitivity
from quantkit.checkpoint import TensorInfo
from quantkit.formats import get_format


def probe_formats(info: TensorInfo, formats: Iterable[str]) -> list[str]:
    """Formats to probe for a tensor: a very coarse one, some in the middle and a fine one."""
    quantized = sorted((f for f in formats if get_format(f).is_quantized()), key=lambda f: get_format(f).bpw())
    if len(quantized) <= 3:
        return quantized
    if "Q4_K" in quantized:
        return [f for f in (quantized[0], "IQ2_S", "Q4_K", "Q6_K") if f in quantized]
    return [quantized[0], quantized[len(quantized) // 2 - 1], quantized[-2]]


def error_of(cost: FormatCost) -> float:
    """The error that scales the cost: Fisher's estimate where it exists, else the activation error."""
    return cost.fisher_kld if cost.fisher_kld > 0 else cost.activation_error


def probed_points(tensor: TensorSensitivity) -> list[tuple[float, float]]:
    """(error, probed KL divergence) of the probed formats, from the smallest error on."""
    return sorted((error_of(c), c.probe_kld) for c in tensor.formats.values() if c.probe_kld and error_of(c) > 0)


def fill_all(tensors: Iterable[TensorSensitivity]) -> None:
    """``fill_predictions`` of every tensor; those without probes go by what the probes of their role said, else of all."""
    ratios: dict[str, list[float]] = {}
    rest = []
    for tensor in tensors:
        points = probed_points(tensor)
        if not points:
            rest.append(tensor)
            continue
        fill_predictions(tensor)
        ratios.setdefault(tensor.role, []).append(float(np.mean([math.log(k / e) for e, k in points])))
    everywhere = [ratio for found in ratios.values() for ratio in found]
    for tensor in rest:
        known = ratios.get(tensor.role) or everywhere
        fill_predictions(tensor, [(1.0, math.exp(float(np.mean(known))))] if known else [])


def fill_predictions(tensor: TensorSensitivity, elsewhere: list[tuple[float, float]] | None = None) -> None:
    """Set ``predicted_kld`` of every format.

    A probed format keeps its probe. Between probes log(KLD ÷ error) is interpolated over log(error), beyond them it
    stays; without probes the Fisher estimate is the prediction. Costs never rise with more bits.

    elsewhere: (error, KL divergence) of tensors like this one, for one without probes.
    """
    points = probed_points(tensor) or sorted(elsewhere or [])
    log_error = [float(np.log(e)) for e, _ in points]
    log_ratio = [float(np.log(k / e)) for e, k in points]
    for cost in tensor.formats.values():
        if cost.probe_kld is not None:
            cost.predicted_kld = cost.probe_kld
        elif points and error_of(cost) > 0:
            here = np.exp(np.interp(np.log(error_of(cost)), log_error, log_ratio))
            cost.predicted_kld = float(here * error_of(cost))
        else:
            cost.predicted_kld = cost.fisher_kld
    ordered = sorted(tensor.formats.items(), key=lambda item: get_format(item[0]).bpw())
    for (coarse_name, coarse), (fine_name, fine) in pairwise(ordered):
        if get_format(fine_name).bpw() > get_format(coarse_name).bpw():
            fine.predicted_kld = min(fine.predicted_kld, coarse.predicted_kld)


def fit_composition(predicted: list[float], measured: list[float]) -> tuple[float, float]:
    """(factor, exponent) of measured ≈ factor · predicted^exponent, least squares in logarithms.

    predicted: sums of single-tensor costs of some plans; measured: their true KL divergence. The exponent
    is kept within 0.7 … 1.3: beyond, the points do not tell.
    """
    x, y = np.log(np.maximum(predicted, 1e-12)), np.log(np.maximum(measured, 1e-12))
    if len(x) < 2 or np.ptp(x) < 0.1:
        return float(np.exp(np.mean(y - x))), 1.0
    exponent = float(np.clip(np.polyfit(x, y, 1)[0], 0.7, 1.3))
    return float(np.exp(np.mean(y - exponent * x))), exponent


def summed_cost(sensitivity: Sensitivity, formats: dict[str, str]) -> float:
    """Sum of the single-tensor costs of an assignment tensor → format."""
    return sum(sensitivity.tensors[name].formats[fmt].predicted_kld for name, fmt in formats.items())


def balanced_formats(sensitivity: Sensitivity, bpw: float) -> tuple[dict[str, str], float]:
    """tensor → format at about ``bpw`` bits per weight, every tensor at the same price of a bit; and that price, in nats.

    Minimizes cost + price · bytes for each tensor by itself and bisects the price: what the exact solver
    finds, up to one step. Used to measure how costs add up before there is a plan.
    """
    weights = {name: math.prod(t.shape) for name, t in sensitivity.tensors.items()}
    total = sum(weights.values())

    def at(price: float) -> dict[str, str]:
        return {
            name: min(t.formats, key=lambda f: t.formats[f].predicted_kld + price * get_format(f).bpw() * weights[name])
            for name, t in sensitivity.tensors.items()
        }

    low, high = 1e-18, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        used = sum(get_format(f).bpw() * weights[name] for name, f in at(middle).items()) / total
        low, high = (middle, high) if used > bpw else (low, middle)
    return at(high), high
