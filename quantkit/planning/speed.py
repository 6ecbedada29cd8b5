"""How fast a plan decodes: weights read per token over the rate at which this machine reads a format.

Decoding one token multiplies every weight that the token touches with one vector. Its time is

    seconds per token = Σ over tensors of touched weights ÷ rate(format) + graph nodes × seconds per node

with both rates measured by quantkit.planning.rates on llama.cpp's own CPU kernels.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.roles import Role
from quantkit.errors import FormatError, PlanError
from quantkit.formats import Format, get_format
from quantkit.planning.memory import Run, Shape, _Builder
from quantkit.planning.plan import Plan, read_document
from quantkit.progress import Progress

VERSION = 1
QUIET = 0.9  # part of their cores that the measuring threads must have had
VIEWS = ("view", "reshape")  # nodes that compute nothing


@dataclass(frozen=True)
class Rates:
    """How fast a runtime multiplies a matrix with one vector.

    weights_per_second: by format, weights read from memory. cached: the same for weights that lie in the
    processor's last cache, which holds cache_bytes. seconds_per_node: what every node of the graph takes beside
    its weights. cpu_share: part of the time in which the measuring threads had their cores (1: a quiet machine).
    """

    weights_per_second: dict[str, float]
    cached: dict[str, float] = field(default_factory=dict)
    cache_bytes: int = 0
    seconds_per_node: float = 0.0
    machine: str = ""
    runtime: str = ""
    threads: int = 0
    cpu_share: float = 1.0

    def of_size(self, nbytes: int) -> dict[str, float]:
        """The rates of a model of ``nbytes``: those of the cache if it fits there."""
        return self.cached if self.cached and nbytes <= self.cache_bytes else self.weights_per_second

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps({"quantkit_rates": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def read(path: Path) -> Rates:
        """Read what `quantkit speed` wrote, or a plain ``{"Q4_K": weights per second, …}``. Raises PlanError."""
        hint = 'give what `quantkit speed --json` prints, or {"Q4_K": 1.2e10, …} with weights per second by format'
        data = read_document(path, hint)
        if not isinstance(data, dict):
            raise PlanError(f"{path} holds no rates", hint=hint)
        version = data.pop("quantkit_rates", VERSION)
        if version != VERSION:
            raise PlanError(f"{path} was written by another version of quantkit", hint="run `quantkit speed` again")
        try:
            rates = Rates(**data) if "weights_per_second" in data else Rates(data, machine=path.name)
            rates._check()
        except (TypeError, ValueError, AttributeError, FormatError) as error:
            raise PlanError(f"{path} holds no rates ({error})", hint=hint) from None
        return rates

    def _check(self) -> None:
        """Raise ValueError, TypeError, AttributeError or FormatError for what is no rate."""
        if not self.weights_per_second:
            raise ValueError("there is none")
        for table in (self.weights_per_second, self.cached):
            for name, value in table.items():
                if name != get_format(name).name or not 0 < float(value) < math.inf:
                    raise ValueError(f"{name}: {value!r}")
        if not 0 <= float(self.seconds_per_node) < math.inf or self.cache_bytes < 0 or self.threads < 0:
            raise ValueError(f"seconds_per_node {self.seconds_per_node!r}")

    def describe(self) -> str:
        """Where the rates come from, in words."""
        if not self.threads:
            return f"rates of {self.machine}"
        busy = "" if self.cpu_share >= QUIET else ", measured while the machine was busy, so too low"
        return f"{self.runtime}, {self.threads} thread{'s' if self.threads > 1 else ''}{busy}"


@dataclass(frozen=True)
class SpeedRequest:
    """What a user asks for. least: tokens per second (None: only predict). rates: a file instead of measuring here.

    threads: of the run; None: all cores.
    """

    least: float | None = None
    rates: Path | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.least is not None and not (math.isfinite(self.least) and self.least > 0):
            raise PlanError(f"--min-tokens-per-second {self.least} is out of range", hint="give a number above 0")

    def find_rates(self, progress: Progress | None = None) -> Rates:
        """The rates of the file, or of this machine: kept, or measured now. Raises PlanError or MissingDependencyError."""
        if self.rates is not None:
            return Rates.read(Path(self.rates))
        from quantkit.planning.rates import rates_of_this_machine

        return rates_of_this_machine(self.threads, progress)


def touched_weights(info: TensorInfo, checkpoint: Checkpoint) -> float:
    """Weights of a tensor that decoding one token reads.

    Routed experts count by the share of experts that a token uses, the embedding by one row, and in full
    where it is the head too.
    """
    if info.role is Role.EMBEDDING:
        return info.columns + (info.size if checkpoint.tied else 0)
    if info.experts > 1:
        return info.size * int(checkpoint.config["num_experts_per_tok"]) / info.experts
    return info.size


class Clock:
    """Predicts times for one model of about ``nbytes`` on one machine."""

    def __init__(self, checkpoint: Checkpoint, rates: Rates, nbytes: int) -> None:
        self.rates, self._table = rates, rates.of_size(nbytes)
        self._touched = {info.name: touched_weights(info, checkpoint) for info in checkpoint.tensors.values()}
        routers = sum(self._touched[info.name] for info in checkpoint.tensors.values() if not info.quantizable)
        per_weight = 1 / self._table["F32"] if "F32" in self._table else 0.0
        self.fixed = routers * per_weight + compute_nodes(checkpoint) * rates.seconds_per_node  # whatever the formats

    def knows(self, fmt: type[Format]) -> bool:
        """Whether the rate of a format is known."""
        return fmt.name in self._table

    def require(self, offered: list[type[Format]], name: str) -> list[type[Format]]:
        """Those of ``offered`` whose rate is known. Raises PlanError if there is none."""
        known = [fmt for fmt in offered if self.knows(fmt)]
        if not known:
            raise PlanError(
                f"no rate is known for any format that {name} may get ({', '.join(fmt.name for fmt in offered)})",
                hint="add rates to the file of --rates, or allow other --formats",
            )
        return known

    def seconds(self, info: TensorInfo, fmt: type[Format]) -> float:
        """Seconds per token of one tensor in a format. Raises PlanError if its rate is not known."""
        if not self.knows(fmt):
            raise PlanError(f"{self.rates.describe()} has no rate for {fmt.name}", hint="add it to the file of --rates")
        return self._touched[info.name] / self._table[fmt.name]

    def tokens_per_second(self, checkpoint: Checkpoint, plan: Plan) -> float | None:
        """Predicted decoding speed of a whole plan at an empty context; None if a format's rate is not known."""
        seconds = self.fixed
        for info in checkpoint.tensors.values():
            fmt = get_format(plan.tensors[info.name].format)
            if info.quantizable and not self.knows(fmt):
                return None
            seconds += self.seconds(info, fmt) if info.quantizable else 0.0
        return 1 / seconds


def compute_nodes(checkpoint: Checkpoint) -> int:
    """Nodes of llama.cpp's graph for one token that compute something."""
    graph = _Builder(Shape.of(checkpoint), Run(context=256), 1, 1).build()
    return sum(node.op not in VIEWS for node in graph.nodes)
