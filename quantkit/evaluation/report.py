"""The HTML report: one offline file, rendered from the same Report as the table and the JSON."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.analysis.plot import analysis_figure
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint.files import write_text
from quantkit.checkpoint.roles import layer_of, role_of
from quantkit.evaluation.compare import Candidate, Report
from quantkit.formats import get_format
from quantkit.formats.tensors import tensor_formats

TEMPLATE = Path(__file__).parent / "data" / "report.html.jinja"


def write_html(report: Report, path: Path, sensitivity: Sensitivity | None = None) -> None:
    """Write the report with plan heat maps, predicted against measured KLD and, if known, the error curves.

    Raises OutputError if the file cannot be written.
    """
    write_text(path, render_html(report, sensitivity))


def render_html(report: Report, sensitivity: Sensitivity | None = None) -> str:
    """The document as text; everything it shows is inside it."""
    from jinja2 import Environment, select_autoescape

    environment = Environment(
        autoescape=select_autoescape(default=True, default_for_string=True), trim_blocks=True, lstrip_blocks=True
    )
    pictures = [("KL divergence against size", embed(size_figure(report)))]
    pictures += [(f"plan of {c.name}", embed(plan_figure(c))) for c in report.candidates if c.plan]
    predicted = [c for c in report.candidates if c.predicted_kld]
    if predicted:
        pictures.append(("predicted against measured", embed(predicted_figure(predicted))))
    if sensitivity is not None:
        pictures.append(("what hurts", embed(analysis_figure(sensitivity))))
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, pictures=pictures, sensitivity=sensitivity)


def embed(figure: Any) -> str:
    """A matplotlib figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def size_figure(report: Report) -> Any:
    """Mean KLD (log) over file size."""
    figure, axes = _figure(8, 4)
    for i, c in enumerate(report.candidates):
        axes.errorbar(
            c.file_bytes / 1e6,
            max(c.divergence.mean_kld, 1e-9),
            yerr=c.divergence.mean_kld_error,
            fmt="os^vD*P"[i % 7],
            label=c.name,
        )
    axes.set_yscale("log")
    axes.set_xlabel("file size, MB")
    axes.set_ylabel("mean KLD, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plan_figure(candidate: Candidate) -> Any:
    """Layer × role → format, coloured by bits per weight."""
    roles: list[str] = []
    layers = 1
    for name in candidate.plan:
        role = role_of(name).value
        layers = max(layers, (layer_of(name) or 0) + 1)
        if role not in roles:
            roles.append(role)
    bits = np.full((len(roles), layers), np.nan)
    labels: dict[tuple[int, int], str] = {}
    for name, fmt in candidate.plan.items():
        row, layer = roles.index(role_of(name).value), layer_of(name)
        if layer is None:
            bits[row, :] = _bpw(fmt)
            labels[row, layers // 2] = fmt
        else:
            bits[row, layer] = _bpw(fmt)
            labels[row, layer] = fmt
    figure, axes = _figure(max(6.0, 0.75 * layers + 3), 0.42 * len(roles) + 1.2)
    image = axes.imshow(bits, aspect="auto", cmap="cividis", vmin=2, vmax=8.5)
    for (row, layer), fmt in labels.items():
        axes.text(layer, row, fmt, ha="center", va="center", fontsize=7, color="white" if bits[row, layer] < 5.5 else "black")
    axes.set_yticks(range(len(roles)), roles)
    axes.set_xticks(range(layers))
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="bits per weight")
    return figure


def _bpw(name: str) -> float:
    """Bits per weight of a format, of a usual matrix if it is one of several tensors."""
    names = {fmt.name: fmt for fmt in tensor_formats()}
    return names[name].bpw((4096, 4096)) if name in names else get_format(name).bpw()


def predicted_figure(candidates: list[Candidate]) -> Any:
    """Measured over predicted KLD with the diagonal."""
    figure, axes = _figure(5, 4)
    x = [c.predicted_kld or 0 for c in candidates]
    y = [c.divergence.mean_kld for c in candidates]
    span = [0.5 * min(x + y), 2 * max(x + y)]
    axes.plot(span, span, color="grey", linewidth=1)
    axes.scatter(x, y)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted KLD, nats per token")
    axes.set_ylabel("measured KLD, nats per token")
    axes.grid(alpha=0.3)
    return figure
