"""The charts of the HTML report: KLD against bytes, predicted against measured, errors along the layers, expert coverage."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantkit.analysis.plot import layer_roles, reference_format
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.evaluation.compare import Candidate, Report
from quantkit.evaluation.report.svg import (
    Axis,
    Box,
    chart,
    error_bar,
    frame,
    line,
    log_range,
    mark,
    place_labels,
    tag,
)
from quantkit.planning.standard import BASE
from quantkit.planning.sweep import Sweep

MIX = re.compile(rf"(?:^|[-._])(?:{'|'.join(sorted(BASE, key=len, reverse=True))})(?=$|[-._])", re.IGNORECASE)
STOCK = re.compile(r"(?:^|[-._])stock(?=$|[-._])", re.IGNORECASE)
WIDE, NARROW = (880, 360), (360, 320)
HALF = (460, 300)
COARSE = 10  # a series that is drawn dotted
ERRORS = (
    ("weight_error", "Error of the weights, ‖ΔW‖²/‖W‖²"),
    ("activation_error", "Error of the outputs, E‖ΔWx‖²/E‖Wx‖²"),
    ("int8_activation_error", "Error of the outputs with inputs in INT8"),
    ("fp8_activation_error", "Error of the outputs with inputs in FP8"),
)


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers. pictures: the same for wide and narrow screens, or one for both. legend: (mark, words)."""

    title: str
    note: str
    pictures: tuple[Markup, ...]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: Sequence[tuple[Markup, str]] = ()


def is_stock(candidate: Candidate) -> bool:
    """Whether a name speaks of llama-quantize's own mix: ``…-Q4_K_M.gguf`` without a prediction or a plan of ours, or ``stock``."""
    name = candidate.name.removesuffix(".gguf")
    return bool(STOCK.search(name)) or (
        MIX.search(name) is not None and candidate.predicted_kld is None and "dynamic" not in name.lower()
    )


def short_names(names: Sequence[str]) -> list[str]:
    """Names without ``.gguf`` and without what all begin with, up to a separator; unchanged if that leaves nothing."""
    plain = [name.removesuffix(".gguf") for name in names]
    common = os.path.commonprefix(plain) if len(plain) > 1 else ""  # noqa: RUF071 - by characters is what is wanted
    cut = max((common.rfind(c) for c in "-._"), default=-1) + 1
    short = [name[cut:] for name in plain]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def size_unit(most: float) -> tuple[float, str]:
    """Bytes of the unit in which sizes are drawn, and its name."""
    return next((u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= 1.5 * u[0]), (1.0, "bytes"))


def size_figure(report: Report, sweep: Sweep | None = None) -> Figure:
    """Mean KLD (logarithmic) against bytes, with standard errors; with a sweep also the curve of plans and the mixes."""
    names = short_names([c.name for c in report.candidates])
    found = [
        (c.file_bytes, c.divergence.mean_kld, c.divergence.mean_kld_error, name, is_stock(c))
        for c, name in zip(report.candidates, names, strict=True)
        if math.isfinite(c.divergence.mean_kld)
    ]
    rows = [
        [c.name, f"{c.file_bytes:,}", f"{c.divergence.mean_kld:.5f} ± {c.divergence.mean_kld_error:.5f}"]
        for c in report.candidates
    ]
    legend = []
    if any(not stock for *_, stock in found):
        legend.append((_sample(mark(0, 9, 9, "", class_="ours")), "candidate"))
    if any(stock for *_, stock in found):
        legend.append((_sample(mark(1, 9, 9, "", hollow=True, class_="stock")), "llama-quantize's own mix, by its name"))
    if sweep is not None:
        legend.append((_sample(line(0, [(0, 9), (18, 9)], "curve")), "plans at every size (quantkit sweep)"))
        legend.append((_sample(mark(2, 9, 9, "", hollow=True, class_="curve")), "mixes in the sweep"))
        rows += [[f"sweep: {p.name}", f"{p.file_bytes:,}", f"{p.kld:.5f}"] for p in sweep.points]
    return Figure(
        "KL divergence against size", "Lower and further left is better. Bars: one standard error.",
        tuple(_size_picture(found, sweep, *size) for size in (WIDE, NARROW)), ("file", "bytes", "mean KLD"), rows, legend,
    )  # fmt: skip


def _sample(shape: Markup) -> Markup:
    return tag("svg", shape, viewBox="0 0 18 18", width="18", height="18", aria_hidden="true")


def _size_picture(found: list[tuple[int, float, float, str, bool]], sweep: Sweep | None, width: float, height: float) -> Markup:
    points = sweep.points if sweep else []
    sizes = [float(b) for b, *_ in found] + [float(p.file_bytes) for p in points]
    unit, unit_name = size_unit(max(sizes, default=0))
    low, high = log_range([k for _, k, *_ in found] + [k + e for _, k, e, *_ in found] + [p.kld for p in points])
    least, most = min(sizes, default=0) / unit, max(sizes, default=1) / unit
    room = max(0.08 * (most - least), 0.05 * most) or 1  # files of nearly one size stand near each other
    x = Axis(least - room, most + room * (2 if width > 500 else 1), 56, width - 12)
    y = Axis(low, high, height - 46, 26, log=True)
    parts: list[object] = [*frame(x, y, f"file size, {unit_name}", "mean KLD, nats per token")]
    if sweep is not None:
        parts.append(line(0, [(x.at(p.file_bytes / unit), y.at(p.kld)) for p in sweep.of_kind("dynamic")], "curve"))
        for p in sweep.of_kind("stock"):
            words = f"{p.name} in the sweep: {p.file_bytes:,} bytes, KLD {p.kld:.5f}"
            parts.append(mark(2, x.at(p.file_bytes / unit), y.at(p.kld), words, hollow=True, class_="curve"))
    for stock, class_ in ((True, "stock"), (False, "ours")):
        own = sorted((b, k) for b, k, _, _, is_it in found if is_it == stock)
        if len(own) > 1:
            parts.append(line(0 if not stock else COARSE, [(x.at(b / unit), y.at(k)) for b, k in own], f"{class_} thin"))
    labels = []
    for nbytes, kld, error, name, stock in sorted(found, key=lambda entry: entry[4]):
        place = x.at(nbytes / unit), y.at(kld)
        class_ = "stock" if stock else "ours"
        if error > 0:
            parts.append(error_bar(place[0], y.at(kld - error), y.at(kld + error), class_))
        words = f"{name}: {nbytes:,} bytes, mean KLD {kld:.5f} ± {error:.5f}"
        parts.append(mark(1 if stock else 0, *place, words, hollow=stock, class_=class_))
        labels.append((*place, name))
    parts += place_labels(labels, Box(x.start + 4, y.end - 4, width, y.start - 2))
    return chart(width, height, f"Mean KL divergence against file size of {len(found)} candidates", *parts)


def predicted_figure(report: Report) -> Figure | None:
    """Measured over predicted KLD with the diagonal; None if nothing was predicted."""
    names = short_names([c.name for c in report.candidates])
    found = [
        (c.predicted_kld, c.divergence.mean_kld, c.divergence.mean_kld_error, name)
        for c, name in zip(report.candidates, names, strict=True)
        if c.predicted_kld and math.isfinite(c.divergence.mean_kld) and math.isfinite(c.predicted_kld)
    ]
    if not found:
        return None
    width, height = HALF
    low, high = log_range([v for p, m, *_ in found for v in (p, m)])
    x, y = Axis(low, high, 56, width - 12, log=True), Axis(low, high, height - 46, 26, log=True)
    parts: list[object] = [*frame(x, y, "predicted KLD", "measured KLD, nats per token")]
    parts.append(line(COARSE, [(x.start, y.start), (x.end, y.end)], "stock"))
    labels = []
    for predicted, measured, error, name in found:
        place = x.at(predicted), y.at(measured)
        if error > 0:
            parts.append(error_bar(place[0], y.at(measured - error), y.at(measured + error), "ours"))
        parts.append(mark(0, *place, f"{name}: predicted {predicted:.5f}, measured {measured:.5f}", class_="ours"))
        labels.append((*place, name))
    parts += place_labels(labels, Box(x.start + 4, y.end - 4, width, y.start - 2))
    rows = [[n, f"{p:.5f}", f"{m:.5f} ± {e:.5f}", f"{m / p:.2f}"] for p, m, e, n in found]
    label = f"Measured against predicted KL divergence of {len(found)} candidates"
    return Figure(
        "Predicted against measured", "On the dotted line the plan came true; above it the loss is larger than promised.",
        (chart(width, height, label, *parts),), ("candidate", "predicted", "measured", "ratio"), rows,
    )  # fmt: skip


def error_figures(sensitivity: Sensitivity) -> list[Figure]:
    """Errors along the layers, a line for each role: of weights and outputs at 4.5 bits, and of rounded inputs."""
    return [figure for name, title in ERRORS if (figure := _error_figure(sensitivity, name, title)) is not None]


def _error_figure(sensitivity: Sensitivity, attribute: str, title: str) -> Figure | None:
    roles, layers = layer_roles(sensitivity)
    found: dict[str, dict[int, float]] = {}
    for tensor in sensitivity.tensors.values():
        of = tensor if hasattr(tensor, attribute) else tensor.formats[reference_format(tensor)]
        value = getattr(of, attribute)
        if tensor.layer is not None and value is not None and value > 0:
            found.setdefault(tensor.role, {})[tensor.layer] = float(value)
    if not found:
        return None
    width, height = HALF
    low, high = log_range([v for values in found.values() for v in values.values()], 0.06)
    x, y = Axis(0, max(layers - 1, 1), 56, width - 14), Axis(low, high, height - 46, 26, log=True)
    parts: list[object] = [*frame(x, y, "layer", "share of the square", whole=True)]
    every = max(1, layers // 16)
    for role, values in found.items():
        number = roles.index(role)
        places = [(x.at(layer), y.at(value)) for layer, value in sorted(values.items())]
        parts.append(line(number, places))
        for (layer, value), place in list(zip(sorted(values.items()), places, strict=True))[::every]:
            parts.append(mark(number, *place, f"{role}, layer {layer}: {value:.3g}"))
    legend = [(_sample(mark(roles.index(role), 9, 9, "")), role) for role in found]
    columns = ["layer", *found]
    rows = [[str(n), *(f"{v[n]:.3g}" if n in v else "–" for v in found.values())] for n in range(layers)]
    label = f"{title} along {layers} layers, for {', '.join(found)}"
    return Figure(title, "", (chart(width, height, label, *parts),), columns, rows, legend)


def coverage_picture(sensitivity: Sensitivity) -> Markup | None:
    """For each layer: tokens of the expert that saw fewest, before and after it was shown more. None without experts."""
    if not sensitivity.coverage:
        return None
    entries = []
    for c in sensitivity.coverage:
        after = [sum(parts) for parts in zip(c["routed"], c["further"], c["nearest"], strict=True)]
        entries.append((c["layer"], min(c["routed"]), min(after), c["wanted"]))
    width, height = HALF[0], 74 + 22 * len(entries)
    low, high = log_range([max(v, 0.5) for entry in entries for v in entry[1:]], 0.1)
    x = Axis(low, high, 56, width - 14, log=True)
    y = Axis(-0.5, len(entries) - 0.5, 26, height - 46)
    parts: list[object] = []
    for value in x.ticks(5):
        parts.append(tag("path", d=f"M{x.at(value):g} {y.start:g}V{y.end:g}", class_="grid"))
        parts.append(tag("text", f"{value:g}", x=x.at(value), y=y.end + 17, text_anchor="middle"))
    parts.append(tag("text", "tokens of the expert that saw fewest", x=x.end, y=y.end + 34, text_anchor="end", class_="name"))
    for row, (layer, before, after_, wanted) in enumerate(entries):
        at = y.at(row)
        parts.append(tag("text", f"layer {layer}", x=x.start - 6, y=at + 4, text_anchor="end"))
        parts.append(line(0, [(x.at(max(before, 0.5)), at), (x.at(after_), at)], "ours"))
        parts.append(tag("path", d=f"M{x.at(wanted):g} {at - 8:g}v16", class_="line stock"))
        parts.append(mark(0, x.at(max(before, 0.5)), at, f"layer {layer}: {before:,} before", True, "ours"))
        parts.append(mark(0, x.at(after_), at, f"layer {layer}: {after_:,} after; {wanted:,} wanted", class_="ours"))
    return chart(width, height, f"Fewest tokens of an expert in {len(entries)} layers, before and after", *parts)


def coverage_legend() -> list[tuple[Markup, str]]:
    """What the marks of ``coverage_picture`` mean."""
    return [
        (_sample(mark(0, 9, 9, "", True, "ours")), "from the calibration text"),
        (_sample(mark(0, 9, 9, "", class_="ours")), "after more was shown"),
        (_sample(tag("path", d="M9 1v16", class_="line stock")), "wanted"),
    ]
