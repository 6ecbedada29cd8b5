"""The whole curve: the best plan at every size, and llama-quantize's mixes as points beside it, from one analysis."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.analysis.probing import decoded
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.analysis.texts import WINDOW, load_calibration, read_text, token_windows
from quantkit.analysis.windows import PROBE_TOKENS, spread, with_logits
from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.documents import typed
from quantkit.checkpoint.files import read_json
from quantkit.checkpoint.transformed import TransformedCheckpoint
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.modeling.products import fast_float32
from quantkit.planning.artifact import stock_bytes
from quantkit.planning.budget import Request, budget_bytes
from quantkit.planning.dynamic import dynamic_plan, size_range, total_prediction
from quantkit.planning.plan import Plan
from quantkit.planning.policy import Policy
from quantkit.planning.speed import Clock, Rates
from quantkit.planning.standard import BASE, standard_plan
from quantkit.progress import Progress

KIND, VERSION = "quantkit_sweep", 1
STEPS = 13
LEAST_KLD = 1e-9  # nats per token; smaller divergences are drawn and compared as this


@dataclass
class Point:
    """One size on the curve (kind ``dynamic``), or one of llama-quantize's mixes (kind ``stock``).

    file_bytes of a mix: what llama-quantize writes. KLD in nats per token; measured_error: its standard error.
    tensors: name → (format, method).
    """

    name: str
    kind: str
    file_bytes: int
    bpw: float
    predicted_kld: float
    tensors: dict[str, tuple[str, str]]
    measured_kld: float | None = None
    measured_error: float | None = None
    tokens_per_second: float | None = None

    @property
    def kld(self) -> float:
        """The measured divergence, or the predicted one."""
        return max(self.predicted_kld if self.measured_kld is None else self.measured_kld, LEAST_KLD)


@dataclass(frozen=True)
class Comparison:
    """The curve against one mix. kld_ratio: at equal bytes; bytes_ratio: at equal KLD. None outside the curve."""

    name: str
    kld_ratio: float | None
    bytes_ratio: float | None


@dataclass
class Sweep:
    """All points, by size. measured_on: names of the texts; measured_tokens: how many tokens of them."""

    model: str
    estimator: str
    points: list[Point]
    notes: list[str] = field(default_factory=list)
    measured_on: list[str] = field(default_factory=list)
    measured_tokens: int = 0
    speed_measured_on: str = ""

    def of_kind(self, kind: str) -> list[Point]:
        """The points of a kind, by size."""
        return sorted((p for p in self.points if p.kind == kind), key=lambda p: p.file_bytes)

    def comparisons(self) -> list[Comparison]:
        """Each mix against the curve, between whose points the logarithm of the KLD is linear in the bytes."""
        curve = self.of_kind("dynamic")
        sizes = np.array([p.file_bytes for p in curve], float)
        logs = np.log([p.kld for p in curve])
        falling = np.minimum.accumulate(logs)  # a larger file may also hold the smaller plan
        out = []
        for mix in self.of_kind("stock"):
            here = float(np.interp(mix.file_bytes, sizes, logs, math.nan, math.nan)) if len(sizes) else math.nan
            there = float(np.interp(-math.log(mix.kld), -falling, sizes, math.nan, math.nan)) if len(sizes) else math.nan
            ratio = None if math.isnan(here) else math.exp(here) / mix.kld
            out.append(Comparison(mix.name, ratio, None if math.isnan(there) else there / mix.file_bytes))
        return out

    def to_json(self) -> str:
        """The document as text."""
        comparisons = [asdict(c) for c in self.comparisons()]
        return json.dumps({KIND: VERSION, **asdict(self), "comparisons": comparisons}, indent=1)

    @staticmethod
    def read(path: Path) -> Sweep:
        """Read sweep.json. Raises CheckpointError if it cannot be read, PlanError if it is something else or damaged."""
        document = read_json(path)
        if document.pop(KIND, None) != VERSION:
            raise PlanError(f"{path} is no sweep of this version", hint="make it with `quantkit sweep MODEL --json FILE`")
        document.pop("comparisons", None)
        try:
            found: Sweep = typed(Sweep, document, "the sweep")
        except ValueError as error:
            raise PlanError(f"{path} is damaged ({error})", hint="make it again with `quantkit sweep`") from None
        return found


def make_sweep(
    checkpoint: Checkpoint, sensitivity: Sensitivity, stats: ActivationStats, policy: Policy, start: float, stop: float,
    steps: int = STEPS, *, rates: Rates | None = None, least_speed: float | None = None,
) -> Sweep:  # fmt: skip
    """Plans at ``steps`` sizes from ``start`` to ``stop`` bits per weight, and the mixes in between.

    Sizes that cannot be had are clipped with a note. Raises PlanError if none can.
    """
    sweep = Sweep(checkpoint.path.resolve().name, sensitivity.estimator, [])
    low, high = size_range(checkpoint, sensitivity, stats, policy)
    if start > high.bpw or stop < low.bpw:
        raise PlanError(
            f"no plan has between {start:g} and {stop:g} bits per weight",
            hint=f"sizes from {low.bpw:.2f} to {high.bpw:.2f} bpw can be had",
        )
    if start < low.bpw or stop > high.bpw:
        sweep.notes.append(f"only sizes from {low.bpw:.2f} to {high.bpw:.2f} bpw can be had: the curve is clipped to them")
    wanted = np.linspace(max(start, low.bpw), min(stop, high.bpw), 1 if start == stop else steps)
    seen: set[int] = set()
    for bpw in wanted:
        size = max(budget_bytes(Request(bpw=float(bpw)), checkpoint, stats)[0], low.file_bytes)
        try:
            plan = dynamic_plan(checkpoint, sensitivity, stats, size, policy, rates=rates, least_speed=least_speed)
        except PlanError as error:
            if least_speed is None:
                raise
            sweep.notes.append(f"{bpw:.2f} bpw: {error.what}")
            continue
        if plan.file_bytes not in seen:
            seen.add(plan.file_bytes)
            sweep.points.append(_point(checkpoint, plan, "dynamic", plan.file_bytes, plan.predicted_kld or 0.0, rates))
    if not sweep.points:
        raise PlanError(sweep.notes[-1], hint="ask for fewer tokens/s or for another range")
    _add_mixes(sweep, checkpoint, sensitivity, stats, start, stop, rates)
    if isinstance(checkpoint, TransformedCheckpoint):
        sweep.notes.append(
            "quantkit moved outlier channels of this model before it encodes; the mixes are shown for the moved weights, and "
            "llama-quantize, which does not move them, leaves more: quantize with --effort 1 and compare to see how much"
        )
    sweep.points.sort(key=lambda p: p.file_bytes)
    sweep.speed_measured_on = rates.describe() if rates is not None else ""
    return sweep


def _add_mixes(
    sweep: Sweep, checkpoint: Checkpoint, sensitivity: Sensitivity, stats: ActivationStats, start: float, stop: float,
    rates: Rates | None,
) -> None:  # fmt: skip
    """llama-quantize's mixes between two sizes; one whose types equal an earlier one's is left out."""
    seen: list[dict[str, tuple[str, str]]] = []
    for name, base in BASE.items():
        if not get_format(base).is_quantized():
            continue
        try:
            plan = standard_plan(checkpoint, name, stats)
        except PlanError as error:
            sweep.notes.append(f"{name} is left out: {error.what}")
            continue
        if not start <= plan.bpw <= stop:
            continue
        point = _point(
            checkpoint,
            plan,
            "stock",
            stock_bytes(checkpoint, plan, stats),
            total_prediction(sensitivity, plan, checkpoint),
            rates,
        )
        point.name = name
        if point.tensors not in seen:
            seen.append(point.tensors)
            sweep.points.append(point)


def _point(checkpoint: Checkpoint, plan: Plan, kind: str, nbytes: int, predicted: float, rates: Rates | None) -> Point:
    tensors = {name: (entry.format, entry.method) for name, entry in plan.tensors.items()}
    speed = Clock(checkpoint, rates, nbytes).tokens_per_second(checkpoint, plan) if rates is not None else None
    return Point(plan.name, kind, nbytes, plan.bpw, predicted, tensors, tokens_per_second=speed)


def judging_windows(
    checkpoint: Checkpoint, texts: list[Path], calibration: list[Path] | None, tokens: int, limit: int | None
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Windows to measure on, int64 (n, window), and the names of their texts.

    From ``texts``; without any, those that calibration set aside. limit: tokens at most. Raises CalibrationError.
    """
    from quantkit.modeling.text import TextEncoder

    window = min(WINDOW, int(checkpoint.config.get("max_position_embeddings") or WINDOW))
    limit = with_logits(checkpoint, window, limit or PROBE_TOKENS)
    if texts:
        encoder = TextEncoder(checkpoint)
        windows = token_windows([read_text(path, encoder) for path in texts], encoder, min(window, limit), limit)
        return windows, [path.name for path in texts]
    text = load_calibration(checkpoint, calibration, tokens)
    return spread(text.dev, limit), [f"{name} (set aside)" for name in text.names]


def require_measurable(checkpoint: Checkpoint) -> None:
    """Raise PlanError if the model, its quantized copy and kept tensors would not fit into memory."""
    needed, memory = 16 * checkpoint.n_weights, physical_memory()
    if needed > memory:
        raise PlanError(
            f"{checkpoint.path.resolve().name} is too large to measure: --measure needs about {needed / 2**30:.1f} GiB "
            f"of memory, and there are {memory / 2**30:.1f} GiB",
            hint="leave out --measure, or quantize the sizes of interest and use `quantkit compare --runtime llama`",
        )


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@fast_float32()
def measure_sweep(
    sweep: Sweep, checkpoint: Checkpoint, stats: ActivationStats, windows: npt.NDArray[np.int64], names: list[str],
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Fill in the true KL divergence of every point: one forward pass each, mean over all positions of ``windows``."""
    from quantkit.analysis.probes import ProbeModel

    require_measurable(checkpoint)
    model = ProbeModel(checkpoint, windows)
    values = _Values(checkpoint, stats, physical_memory() // 4)
    task = (progress or Progress()).task("measure plans", total=len(sweep.points), unit="plans")
    for point in sweep.points:
        found = {
            name: values.of(name, *entry, point.kind)
            for name, entry in point.tensors.items()
            if checkpoint.info(name).quantizable
        }
        klds = model.divergences(found).astype(np.float64)
        point.measured_kld = float(klds.mean())
        point.measured_error = float(klds.std() / math.sqrt(max(len(klds) - 1, 1)))
        task.advance()
    task.done()
    sweep.measured_on, sweep.measured_tokens = names, int(windows.size)


class _Values:
    """Tensors as they come back from a format, kept by name, format and method as long as there is room."""

    def __init__(self, checkpoint: Checkpoint, stats: ActivationStats, room: int) -> None:
        self._checkpoint, self._room = checkpoint, room
        # llama-quantize knows only the text's own traffic, and weighs experts that no token reached with ones
        covered = {
            name: TensorStats(np.where(s.counts[:, None] > 0, s.sum_squares, 1), np.where(s.counts > 0, s.counts, 1))
            for name, s in stats.tensors.items()
        }
        self._stats = {"dynamic": stats, "stock": replace(stats, tensors=covered)}
        self._kept: OrderedDict[tuple[str, ...], npt.NDArray[np.float32]] = OrderedDict()

    def of(self, name: str, fmt: str, method: str, kind: str) -> npt.NDArray[np.float32]:
        """One tensor, float32 in its own shape."""
        key = (name, fmt, method, kind if self._checkpoint.info(name).experts > 1 else "")
        if key not in self._kept:
            self._kept[key] = decoded(self._checkpoint, self._stats[kind], name, fmt, method)
            while len(self._kept) > 1 and sum(v.nbytes for v in self._kept.values()) > self._room:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
