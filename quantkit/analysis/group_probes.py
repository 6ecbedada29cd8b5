"""What groups of tensors really cost, for models too large to probe tensor by tensor.

A group is a role in a third of the model's depth. Its tensors are rounded by ggml's search, to a coarse and to a fine
format, and the divergence that this causes is compared with Fisher's estimate of the very same errors. All groups run
side by side, block by block, so that one decoder layer is in memory at a time; two more runs have everything rounded
and tell how costs add up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.errors import decode_after_encode
from quantkit.analysis.sensitivity import TensorSensitivity
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import get_format
from quantkit.metrics import kl_divergence
from quantkit.modeling.blocks import Blocks
from quantkit.modeling.skeleton import parameter_value, set_parameter, tensor_names
from quantkit.progress import Progress
from quantkit.threads import map_threads

if TYPE_CHECKING:
    import torch

DEPTHS = 3  # parts of the model's depth that are measured apart
FORMATS = (("Q3_K", "Q4_0"), ("Q6_K", "Q5_1"))  # coarse and fine: the first of each that fits the rows
MOST = 8.0  # times a group may cost more or less than estimated

Matrix = npt.NDArray[np.float32]


@dataclass
class Group:
    """One group in one format, or its replacement where rows do not fit.

    tensors: format by name. estimated, measured: KL divergence in nats per token of the same errors.
    """

    role: str
    depth: int
    format: str
    tensors: dict[str, str] = field(default_factory=dict)
    estimated: float = 0.0
    measured: float = 0.0

    @property
    def ratio(self) -> float:
        """How much more its tensors cost than estimated, within reason."""
        if self.estimated <= 0 or self.measured <= 0:
            return 1.0
        return float(np.clip(self.measured / self.estimated, 1 / MOST, MOST))

    def to_json(self) -> dict[str, Any]:
        """For analysis.json."""
        return asdict(self)


def group_key(checkpoint: Checkpoint, info: TensorInfo) -> tuple[str, int]:
    """Role and part of the depth (−1 outside the layers): tensors that are measured and corrected together."""
    return info.role.value, -1 if info.layer is None else DEPTHS * info.layer // checkpoint.n_layers


def measure_groups(
    checkpoint: Checkpoint, stats: ActivationStats, tensors: dict[str, TensorSensitivity], windows: npt.NDArray[np.int64],
    progress: Progress,
) -> tuple[list[Group], list[Group]]:  # fmt: skip
    """(groups, everything at each of two formats), measured on token windows (n, window)."""
    import torch

    runs = _Runs(checkpoint, stats, tensors)
    blocks = runs.blocks
    task = progress.task("measure groups", total=blocks.n_layers + 2, unit="layers")
    with torch.inference_mode():
        states = runs.embed(windows)
        task.advance()
        for index in range(blocks.n_layers):
            with blocks.layer(index) as layer:
                states = runs.layer(index, layer, states)
            task.advance()
        runs.head(states)
        task.advance()
    task.done()
    return runs.groups, runs.whole


class _Runs:
    """The original (key None) and every group's copy of the hidden states, on their way through the model.

    A group shares the original's states up to its first layer.
    """

    def __init__(self, checkpoint: Checkpoint, stats: ActivationStats, tensors: dict[str, TensorSensitivity]) -> None:
        self.blocks = Blocks(checkpoint)
        self._checkpoint, self._stats = checkpoint, stats
        found: dict[tuple[str, int, str], Group] = {}
        self.whole = [Group("all", -1, choice[0]) for choice in FORMATS]
        for name, tensor in tensors.items():
            info = checkpoint.info(name)
            for everything, choice in zip(self.whole, FORMATS, strict=True):
                fmt = next((name for name in choice if get_format(name).fits(info.columns)), None)
                if fmt is None:
                    continue
                key = (*group_key(checkpoint, info), choice[0])
                for group in (found.setdefault(key, Group(*key)), everything):
                    group.tensors[name] = fmt
                    cost = tensor.formats[fmt]
                    group.estimated += cost.fisher_kld if cost.search_kld is None else cost.search_kld
        self.groups = list(found.values())
        self._all = [*self.groups, *self.whole]

    def _rounded(self, name: str, group: Group) -> Matrix:
        """A tensor as a group has it, in its own shape."""
        info = self._checkpoint.info(name)
        fmt = get_format(group.tensors[name])
        weights = self._checkpoint.read(name).reshape(info.experts, -1, info.columns)

        def part(expert: int) -> Matrix:
            return decode_after_encode(weights[expert], self._stats.importance(name, expert), fmt, name)

        return np.stack(map_threads(part, range(info.experts))).reshape(info.shape)

    def embed(self, windows: npt.NDArray[np.int64]) -> dict[int | None, torch.Tensor]:
        """Hidden states before the first layer, by place of the group; the original's under None."""
        states: dict[int | None, torch.Tensor] = {None: self.blocks.embed(windows)}
        for place, group in enumerate(self._all):
            if "token_embd.weight" in group.tensors:
                table = self._rounded("token_embd.weight", group)
                states[place] = Blocks(self._checkpoint, _Replaced(self._checkpoint, {"token_embd.weight": table})).embed(windows)
        return states

    def layer(self, index: int, layer: Any, states: dict[int | None, torch.Tensor]) -> dict[int | None, torch.Tensor]:
        """All copies through one layer."""
        after: dict[int | None, torch.Tensor] = {None: layer(states[None])}
        for place, group in enumerate(self._all):
            touched = [name for name in group.tensors if self._checkpoint.info(name).layer == index]
            if touched or place in states:
                with self._changed(index, group, touched):
                    after[place] = layer(states[place] if place in states else states[None])
        return after

    @contextlib.contextmanager
    def _changed(self, index: int, group: Group, touched: list[str]) -> Iterator[None]:
        """The loaded layer with a group's tensors rounded, for a while."""
        module, prefix = self.blocks.model.model.layers[index], f"model.layers.{index}."
        source = _Replaced(self._checkpoint, {name: self._rounded(name, group) for name in touched})
        originals = {}
        for parameter, value in list(module.named_parameters()):
            if source.values.keys() & set(tensor_names(self._checkpoint, prefix + parameter)):
                originals[parameter] = value.data
                set_parameter(module, parameter, parameter_value(self._checkpoint, prefix + parameter, source.read))
        try:
            yield
        finally:
            for parameter, original in originals.items():
                set_parameter(module, parameter, original)

    def head(self, states: dict[int | None, torch.Tensor]) -> None:
        """Measure every group; the head itself, rounded, belongs to its own group and to everything."""
        name = "token_embd.weight" if self._checkpoint.tied else "output.weight"
        rounded = [place for place, group in enumerate(self._all) if name in group.tensors]
        totals = np.zeros(len(self._all))
        with self.blocks.head() as head:
            reference = [head(window).log_softmax(-1) for window in states[None]]
            for place in range(len(self._all)):
                if place not in rounded:
                    totals[place] = _divergence(reference, head, states[place])
        for place in rounded:
            table = self._rounded(name, self._all[place])
            with Blocks(self._checkpoint, _Replaced(self._checkpoint, {name: table})).head() as head:
                totals[place] = _divergence(reference, head, states[place] if place in states else states[None])
        for group, total in zip(self._all, totals, strict=True):
            group.measured = float(total)


@dataclass(frozen=True)
class _Replaced:
    """A checkpoint with some tensors replaced."""

    checkpoint: Checkpoint
    values: dict[str, Matrix]

    def read(self, name: str) -> Matrix:
        """A whole tensor."""
        return self.values[name] if name in self.values else self.checkpoint.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Matrix:
        """Rows start … stop."""
        return self.values[name][start:stop] if name in self.values else self.checkpoint.read_rows(name, start, stop)


def _divergence(reference: list[torch.Tensor], head: Any, states: torch.Tensor) -> float:
    """Mean KL divergence, nats per token; one window's logits at a time."""
    return float(np.mean([kl_divergence(logp, head(window)).mean() for logp, window in zip(reference, states, strict=True)]))
