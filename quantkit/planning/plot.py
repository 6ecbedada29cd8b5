"""The picture of a sweep: divergence against bytes, with llama-quantize's mixes as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import atomic_file
from quantkit.planning.sweep import LEAST_KLD, Point, Sweep

CURVE, STOCK = "#0072b2", "#d55e00"  # blue and vermilion of Okabe and Ito's palette; shapes differ too
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Write the picture as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as handle:
        sweep_figure(sweep).savefig(handle, dpi=120, format="png")


def sweep_figure(sweep: Sweep) -> Any:
    """The same as a matplotlib figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    scale, unit = next((s, u) for s, u in UNITS if max(p.file_bytes for p in sweep.points) >= s or s == 1)
    curve, stock = sweep.of_kind("dynamic"), sweep.of_kind("stock")
    measured = bool(sweep.measured_on)
    x = [p.file_bytes / scale for p in curve]
    predicted = [max(p.predicted_kld, LEAST_KLD) for p in curve]
    if measured:
        axes.plot(x, predicted, ":", color=CURVE, linewidth=1, label="quantkit, predicted")
    label = f"quantkit, {'measured' if measured else 'predicted'}"
    axes.plot(x, [p.kld for p in curve], "-o", color=CURVE, markersize=5, label=label)
    _mixes(axes, stock, scale, measured)
    axes.set_yscale("log")
    axes.set_xlabel(f"file, {unit}")
    axes.set_ylabel("KL divergence from the original, nats per token")
    where = f"measured on {sweep.measured_tokens:,} tokens" if measured else f"predicted ({sweep.estimator}), not measured"
    axes.set_title(f"{sweep.model}: what a size costs, {where}", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9, loc="upper right")
    return figure


def _mixes(axes: Any, stock: list[Point], scale: int, measured: bool) -> None:
    """The mixes as squares with their names: below where no mix is both smaller and better, else above, across the curve."""
    if not stock:
        return
    label = "llama-quantize's mixes, measured" if measured else "the same types as llama-quantize's mixes, predicted"
    face = STOCK if measured else "none"
    xs, ys = [p.file_bytes / scale for p in stock], [p.kld for p in stock]
    axes.plot(xs, ys, "s", color=STOCK, markerfacecolor=face, markersize=5, label=label)
    for i, point in enumerate(stock):
        above = any(other.file_bytes <= point.file_bytes and other.kld < point.kld for other in stock)
        axes.annotate(
            point.name, (xs[i], ys[i]), xytext=(4, 4) if above else (-4, -4), textcoords="offset points", fontsize=7, rotation=45,
            rotation_mode="anchor", ha="left" if above else "right", va="center",
        )  # fmt: skip
