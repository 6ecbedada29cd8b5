"""Heat maps of the HTML report, layer × role: the format of every tensor with its reason, and what each layer would cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from quantkit.analysis.plot import reference_format
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint.roles import Role, layer_of, role_of
from quantkit.evaluation.compare import Candidate
from quantkit.formats import get_format
from quantkit.formats.tensors import tensor_formats
from quantkit.quantizer.manifest import Manifest, manifest_path

EDGES = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0)  # bits per weight between two colours
STEPS = len(EDGES) + 1  # colours: report.css, --b0 to --b7
BITS = ("below 2", *(f"{a:g}–{b:g}" for a, b in pairwise(EDGES)), "9 and more")
CELL = 90  # characters of a cell besides its words
ROOM = 1_500_000  # characters that all heat maps of a report may take


@dataclass(frozen=True)
class Cell:
    """words: what stands in it. step: its colour, 0 to 7. what, why: said of it when it is pointed at."""

    words: str
    step: int
    what: str
    why: str = ""


@dataclass(frozen=True)
class HeatMap:
    """rows: (role, cells); a row of one cell stands for all layers. legend: what each colour means, by step."""

    title: str
    layers: int
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    legend: Sequence[str]
    note: str = ""

    @property
    def room(self) -> int:
        """About how many characters it takes in the document."""
        return sum(CELL + len(c.words + c.what + c.why) for _, cells in self.rows for c in cells if c is not None)


def plan_reasons(path: Path) -> dict[str, str]:
    """Why each tensor of a file or folder has its format, from the manifest beside it; empty without one.

    Raises CheckpointError if the manifest is damaged.
    """
    if not path.exists() or not manifest_path(path).exists():
        return {}
    entries = Manifest.read(manifest_path(path)).tensors
    return {
        name: " · ".join(
            part for part in (f"method {entry['method']}" if entry.get("method") else "", entry.get("reason")) if part
        )
        for name, entry in entries.items()
    }


def bits_of(name: str) -> float:
    """Bits per weight of a format, of a usual matrix if it is one of several tensors."""
    names = {fmt.name: fmt for fmt in tensor_formats()}
    return names[name].bpw((4096, 4096)) if name in names else get_format(name).bpw()


def plan_map(candidate: Candidate, reasons: Mapping[str, str] | None = None) -> HeatMap:
    """The plan of a candidate: formats in the cells, bits per weight as colour, reasons by tensor where they are known."""
    bits = {fmt: bits_of(fmt) for fmt in set(candidate.plan.values())}
    cells = {
        name: Cell(fmt, int(np.searchsorted(EDGES, bits[fmt], side="right")), f"{name}: {fmt}, {bits[fmt]:.2f} bits per weight",
                   (reasons or {}).get(name, ""))
        for name, fmt in candidate.plan.items()
    }  # fmt: skip
    return _arranged(candidate.name, cells, BITS)


def plan_maps(candidates: Sequence[Candidate], reasons: Sequence[Mapping[str, str]] = (), room: int = ROOM) -> list[HeatMap]:
    """Those of all candidates with a plan, as far as ``room`` (characters) allows: reasons go first, then whole maps."""
    out = []
    for number, candidate in enumerate(candidates):
        if not candidate.plan:
            continue
        whole = plan_map(candidate, reasons[number] if number < len(reasons) else None)
        if whole.room > room:
            whole = replace(plan_map(candidate), note="The reasons are left out: the page would become too large.")
        if whole.room > room:
            whole = replace(whole, rows=(), note="Left out: the page would become too large. The numbers at the end have it.")
        room -= whole.room
        out.append(whole)
    return out


def cost_map(sensitivity: Sensitivity) -> HeatMap:
    """What each tensor would cost at about 4.5 bits: predicted KLD for each million weights, thousandths of a nat per token."""
    found = {}
    for name, tensor in sensitivity.tensors.items():
        fmt = reference_format(tensor)
        found[name] = (fmt, 1e9 * tensor.formats[fmt].predicted_kld / float(np.prod(tensor.shape)), tensor.formats[fmt])
    logs = np.log10([max(cost, 1e-9) for _, cost, _ in found.values()] or [0.0, 1.0])
    edges = np.linspace(logs.min(), logs.max(), STEPS + 1)[1:-1]
    cells = {
        name: Cell(
            f"{cost:.2g}", int(np.searchsorted(edges, np.log10(max(cost, 1e-9)), side="right")),
            f"{name} in {fmt}: {cost:.3g} thousandths of a nat per token and million weights",
            f"the tensor: {said.predicted_kld:.3g} nats per token; error of the weights {said.weight_error:.3g}, "
            f"of the outputs {said.activation_error:.3g}",
        )
        for name, (fmt, cost, said) in found.items()
    }  # fmt: skip
    ends = [f"{10**v:.2g}" for v in (logs.min(), *edges, logs.max())]
    return _arranged("", cells, [f"{a}–{b}" for a, b in pairwise(ends)])


def _arranged(title: str, cells: Mapping[str, Cell], legend: Sequence[str]) -> HeatMap:
    """Cells by tensor name as rows; what lies outside the layers comes last."""
    layers = 1 + max((layer_of(name) or 0 for name in cells), default=0)
    rows: dict[str, list[Cell | None]] = {}
    outside: dict[str, list[Cell | None]] = {}
    for name, cell in cells.items():
        layer = layer_of(name)
        if layer is None:
            outside[_row(name)] = [cell]
        else:
            rows.setdefault(_row(name), [None] * layers)[layer] = cell
    order = [role.value for role in Role]
    shown = sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order))
    return HeatMap(title, layers, [*shown, *sorted(outside.items())], legend)


def _row(name: str) -> str:
    """The role of a tensor, or its own name where several of a layer would have the same."""
    role = role_of(name)
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name) if role in (Role.OTHER, Role.NORM, Role.ROUTER) else role.value
