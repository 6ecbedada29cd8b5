"""``sequential``: tensors encoded one after the other, each for the inputs that the quantized model really gives it.

The plain encoders take every tensor by itself: its inputs are those of the original, and its errors stay. Here layers
are quantized in the order in which they run. Two copies go through the calibration text, the original and the one whose
earlier tensors are quantized already, and the weight W of a tensor is first replaced by the one that, from the
quantized copy's inputs y, comes closest to what the original makes of its own inputs x:

    W* = W + (W E[(x − y) yᵀ] + E[d yᵀ]) (E[y yᵀ] + λI)⁻¹

W* is then encoded in the metric of E[y yᵀ]. The first part is the asymmetric calibration of GPTAQ (arXiv 2504.02692).
d is what the residual stream lacks where the tensor's output is added to it, so that attention outputs and down
projections also take back what all tensors before them have left. λ is the damping of ``ldlq``.

Memory: one decoder layer of each copy, the hidden states of the text for both, and the matrices of one group of tensors.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.run import PROBE_WEIGHTS
from quantkit.analysis.texts import CalibrationText
from quantkit.analysis.windows import probe_windows
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.roles import Role
from quantkit.encoders.stats import ActivationStats
from quantkit.formats import get_format
from quantkit.modeling.blocks import Blocks
from quantkit.modeling.products import fast_float32
from quantkit.planning.plan import Plan
from quantkit.progress import Progress, Task
from quantkit.quantizer.pipeline import TENSORS, Job, Packed, decode_all, encode_all
from quantkit.quantizer.sequential_inputs import ADDED, Inputs, Pairs
from quantkit.quantizer.sequential_sums import Sums, add_up, expert_ranges
from quantkit.threads import default_threads, map_threads

if TYPE_CHECKING:
    import torch

VERSION = 1  # raised when the bytes for the same input change
KEPT = 4  # folders of finished tensors in a work directory
BATCH = 4  # windows that run together
STAGES = (
    frozenset({Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V}),
    frozenset({Role.ATTN_O}),
    frozenset({Role.FFN_GATE, Role.FFN_UP, Role.EXPERT_GATE, Role.EXPERT_UP, Role.SHARED_GATE, Role.SHARED_UP}),
    ADDED,
)  # tensors of a layer that see their inputs before any of them is quantized


class Folder(Mapping[str, Packed]):
    """Finished tensors on disk, uint8 (rows, bytes per row) by name; a run that was stopped goes on from them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        path.touch()

    def __getitem__(self, name: str) -> Packed:
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (path.name.removesuffix(".npy") for path in sorted(self.path.glob("*.npy")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def put(self, name: str, packed: Packed) -> None:
        """Keep a tensor; it appears under its name only when it is complete."""
        part = self.path / f"{name}.part"
        with open(part, "wb") as file:
            np.save(file, packed, allow_pickle=False)
        part.replace(self.path / f"{name}.npy")


def _prune(work: Path, used: Path) -> None:
    """Delete all but the newest folders of other plans. Losing them costs time only."""
    others = sorted((p for p in work.glob("sequential-*") if p != used), key=lambda path: path.stat().st_mtime)
    for path in others[: 1 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)


class _View:
    """The model as its quantized copy has it by now: finished tensors as they come back from their formats."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, done: Folder) -> None:
        self._checkpoint, self._plan, self._done = checkpoint, plan, done

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor, float32."""
        info = self._checkpoint.info(name)
        return self.read_rows(name, 0, info.rows).reshape(info.shape) if name in self._done else self._checkpoint.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start … stop, float32 (rows, columns)."""
        if name not in self._done:
            return self._checkpoint.read_rows(name, start, stop)
        return get_format(self._plan.tensors[name].format).decode(np.ascontiguousarray(self._done[name][start:stop]))


@dataclass(frozen=True)
class Sequential:
    """given: bytes by tensor, uint8 (rows, bytes per row), empty if it did not help. before, after: KL divergence on
    text set apart without and with it, nats per token; None where the model is too large to measure that."""

    given: Mapping[str, Packed]
    before: float | None = None
    after: float | None = None

    @property
    def note(self) -> str:
        """What there is to tell about it, a sentence."""
        if self.before is None:
            return "sequential: every tensor encoded for the inputs that the quantized ones before it give"
        if not self.given:
            return "encoding the tensors one after the other did not help on text set apart, they are encoded by themselves"
        return f"sequential: KLD {self.before:.4g} → {self.after:.4g} nats/token on calibration text set apart"


@fast_float32()
def sequential(
    checkpoint: Checkpoint, plan: Plan, stats: ActivationStats, text: CalibrationText, work: Path, progress: Progress
) -> Sequential:
    """Encode the tensors of ``plan`` one after the other; what was finished by an earlier run of the same is reused."""
    moments = stats.moments.key if stats.moments is not None else ""
    asked = [(name, entry.format, entry.method, entry.pins) for name, entry in sorted(plan.tensors.items())]
    key = hashlib.sha256(f"{VERSION} {asked} {checkpoint.identity} {checkpoint.stamp} {moments}".encode() + text.train.tobytes())
    done = Folder(work / f"sequential-{key.hexdigest()[:16]}")
    _prune(work, done.path)
    Sequence(checkpoint, plan, stats, text.train, done, progress).run()
    if checkpoint.n_weights > PROBE_WEIGHTS:
        return Sequential(done)
    model = ProbeModel(checkpoint, probe_windows(checkpoint, text))
    plain = encode_all(checkpoint, plan, stats, work / TENSORS, progress)
    before, after = (model.divergence(decode_all(checkpoint, plan, packed)) for packed in (plain, done))
    return Sequential(done if after < before else {}, before, after)


class Sequence:
    """Both copies on their way through the layers."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, stats: ActivationStats, windows: npt.NDArray[np.int64], done: Folder,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._job = Job(checkpoint, plan, stats, None, default_threads())
        self._done, self._windows, self._progress = done, windows, progress
        self._original, self._quantized = Blocks(checkpoint), Blocks(checkpoint, _View(checkpoint, plan, done))

    def run(self) -> None:
        """All layers, then the head."""
        batches = [self._windows[i : i + BATCH] for i in range(0, len(self._windows), BATCH)]
        layers = self._original.n_layers
        task = self._progress.task("sequential", total=((len(STAGES) + 1) * layers + 1) * self._windows.size, unit="tokens")
        for info in self._todo({Role.EMBEDDING}):
            self._finish(info, [self._encoded(info, None)])
        theirs, ours = ([blocks.embed(batch) for batch in batches] for blocks in (self._original, self._quantized))
        for index in range(layers):
            self._layer(index, theirs, ours, task)
        self._head(theirs, ours, task)
        task.done()

    def _todo(self, roles: Set[Role], layer: int | None = None) -> list[TensorInfo]:
        """Tensors of a group that are to be quantized and are not finished."""
        return [
            info for info in self._job.checkpoint.tensors.values()
            if info.layer == layer and info.role in roles and info.name not in self._done
            and get_format(self._job.plan.tensors[info.name].format).is_quantized()
        ]  # fmt: skip

    def _layer(self, index: int, theirs: list[torch.Tensor], ours: list[torch.Tensor], task: Task) -> None:
        """Quantize one layer group by group, then take both copies through it."""
        import torch

        with self._original.layer(index) as original, self._quantized.layer(index) as quantized, torch.inference_mode():
            for roles in STAGES:
                todo = self._todo(roles, index)
                ranges = {info.name: expert_ranges(info) for info in todo}
                pieces: dict[str, list[Packed]] = {info.name: [] for info in todo}
                for turn in range(max((len(found) for found in ranges.values()), default=0)):
                    wanted = {name: found[turn] for name, found in ranges.items() if turn < len(found)}
                    sums = self._sums(index, (original, theirs), (quantized, ours), wanted)
                    for name in wanted:
                        pieces[name].append(self._encoded(self._job.checkpoint.info(name), sums[name]))
                for info in todo:
                    self._finish(info, pieces[info.name] or [self._encoded(info, None)])
                if todo:
                    self._quantized.reload(index)
                task.advance(self._windows.size)
            for states, layer in ((theirs, original), (ours, quantized)):
                for i, batch in enumerate(states):
                    states[i] = layer(batch)
        task.advance(self._windows.size)

    def _sums(
        self, index: int, theirs: tuple[Any, list[torch.Tensor]], ours: tuple[Any, list[torch.Tensor]], wanted: dict[str, range]
    ) -> dict[str, Sums]:
        """What some experts of some tensors see, by tensor. theirs, ours: the loaded layer and what goes into it."""
        sums = {name: Sums(self._job.checkpoint.info(name), experts) for name, experts in wanted.items()}
        with Inputs(self._original, self._quantized, index, wanted) as inputs:
            for x, y in zip(theirs[1], ours[1], strict=True):
                add_up(sums, inputs.of(theirs[0], ours[0], x, y))
        return sums

    def _head(self, theirs: list[torch.Tensor], ours: list[torch.Tensor], task: Task) -> None:
        """The head, unless the embedding is used for it."""
        import torch

        for info in self._todo({Role.HEAD}):
            sums = Sums(info)
            with torch.inference_mode(), self._original.final_norm() as norm:
                for x, y in zip(theirs, ours, strict=True):
                    sums.add(Pairs(info.name, 0, *(norm(states).flatten(0, 1) for states in (x, y))))
            self._finish(info, [self._encoded(info, sums)])
        task.advance(self._windows.size)

    def _encoded(self, info: TensorInfo, sums: Sums | None) -> Packed:
        """Bytes of the experts that ``sums`` is about; without it of all, as the plain encoders would."""
        job, encode, rows = self._job, self._job.encode, info.rows // info.experts
        experts = range(info.experts) if sums is None else sums.experts
        if sums is not None:
            assert job.stats is not None
            job = replace(job, stats=sums.stats(job.stats, info))

            def target(expert: int) -> npt.NDArray[np.float32]:
                return sums.target(job.checkpoint.read_rows(info.name, expert * rows, (expert + 1) * rows), expert)

            targets, first = np.concatenate(map_threads(target, experts)), experts.start * rows

            def encode(info: TensorInfo, expert: int, start: int, stop: int) -> Packed:
                return job.encode_rows(targets[start - first : stop - first], info, expert, start)

        parts = [part for part in job.slices(info) if part[0] in experts]
        return np.concatenate([piece.reshape(-1) for piece in map_threads(lambda part: encode(info, *part), parts)])

    def _finish(self, info: TensorInfo, pieces: list[Packed]) -> None:
        """Keep a tensor, its bytes given in order."""
        self._done.put(info.name, np.concatenate(pieces).reshape(info.rows, -1))
