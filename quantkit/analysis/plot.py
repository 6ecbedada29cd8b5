"""The picture from which one sees which layers must stay high."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantkit.analysis.sensitivity import Sensitivity, TensorSensitivity
from quantkit.checkpoint.files import atomic_file
from quantkit.formats import get_format


def reference_format(tensor: TensorSensitivity) -> str:
    """The format all tensors are compared at: the one nearest to 4.5 bits per weight."""
    return min(tensor.formats, key=lambda f: abs(get_format(f).bpw() - 4.5))


def draw_analysis(sensitivity: Sensitivity, path: Path) -> None:
    """Write the picture: predicted KLD per weight (layer × role), and errors along the layers."""
    with atomic_file(path) as handle:
        analysis_figure(sensitivity).savefig(handle, dpi=110, format="png")


def analysis_figure(sensitivity: Sensitivity) -> Any:
    """The same as a matplotlib figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle(f"{sensitivity.model}: what 4.5 bits per weight would cost (estimator: {sensitivity.estimator})")
    heat, weights, activations = figure.subplot_mosaic(
        [["heat", "weights"], ["heat", "activations"]], width_ratios=[1.25, 1]
    ).values()
    _heat_map(figure, heat, sensitivity)
    _curves(weights, sensitivity, "weight_error", "weight error ‖ΔW‖²/‖W‖²")
    _curves(activations, sensitivity, "activation_error", "output error E‖ΔWx‖²/E‖Wx‖²")
    activations.set_xlabel("layer")
    handles, labels = weights.get_legend_handles_labels()
    weights.legend(handles, labels, fontsize=7, ncols=2)
    return figure


def layer_roles(sensitivity: Sensitivity) -> tuple[list[str], int]:
    """Roles that occur inside layers, in order of appearance, and the number of layers."""
    roles: list[str] = []
    layers = 0
    for tensor in sensitivity.tensors.values():
        if tensor.layer is not None:
            layers = max(layers, tensor.layer + 1)
            if tensor.role not in roles:
                roles.append(tensor.role)
    return roles, layers


def _heat_map(figure: Any, axes: Any, sensitivity: Sensitivity) -> None:
    roles, layers = layer_roles(sensitivity)
    outside = [t.role for t in sensitivity.tensors.values() if t.layer is None]
    rows = roles + outside
    grid = np.full((len(rows), max(layers, 1)), np.nan)
    for tensor in sensitivity.tensors.values():
        cost = tensor.formats[reference_format(tensor)].predicted_kld / np.prod(tensor.shape) * 1e6
        if tensor.layer is None:
            grid[rows.index(tensor.role), :] = cost
        else:
            grid[rows.index(tensor.role), tensor.layer] = cost
    image = axes.imshow(np.log10(np.maximum(grid, 1e-12)), aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer (embedding and head: one value)")
    axes.set_title("predicted KLD, log₁₀ nats per token and million weights", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _curves(axes: Any, sensitivity: Sensitivity, attribute: str, title: str) -> None:
    roles, _ = layer_roles(sensitivity)
    for i, role in enumerate(roles):
        points = sorted(
            (t.layer, getattr(t.formats[reference_format(t)], attribute))
            for t in sensitivity.tensors.values()
            if t.role == role and t.layer is not None
        )
        marker = "os^vD*P"[i % 7]
        axes.plot(*zip(*points, strict=True), label=role, marker=marker, markersize=4, linewidth=1)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
