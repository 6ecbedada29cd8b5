"""``refine``: block scales, norms and biases relearned against the original's output distribution.

The half-precision scale (and minimum) of every block and the F32 vectors of the model take no byte more or less
whatever their value. They are trained together by gradient descent on the KL divergence from the original over the
calibration text, with codes and group scales as they are; errors that all layers share are taken back where that is
cheapest. Tuning norms alone is arXiv 2309.02784; training step sizes after the codes are fixed, EfficientQAT
(arXiv 2407.11062). Needs the model in memory four times in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import Checkpoint
from quantkit.encoders.ldlq import LdlqEncoder
from quantkit.encoders.parameters import Parameters
from quantkit.encoders.stats import ActivationStats
from quantkit.errors import PlanError
from quantkit.formats import Format, get_format
from quantkit.modeling.products import fast_float32
from quantkit.modeling.skeleton import materialized_model, row_order, tensor_names
from quantkit.planning.plan import Plan
from quantkit.progress import Progress
from quantkit.quantizer.pipeline import TENSORS, decode_all, encode_all

if TYPE_CHECKING:
    import torch

BATCH = 4  # windows of one step
SCALE_RATE, VECTOR_RATE = 2e-3, 1e-3  # steps of Adam: relative for scales, absolute for norms and biases
WARM_UP = 10  # steps
LARGEST = 1_000_000_000  # weights of a model that is refined at most
LEARNED_VECTORS = ("norm", "bias")
APART_TOKENS = 8192  # on which before and after are compared
KLD = "kld"

Packed = dict[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Refined:
    """packed: bytes by tensor, uint8 (rows, bytes per row). before, after: KL divergence on the windows kept apart, nats per token."""

    packed: Packed
    before: float
    after: float

    @property
    def note(self) -> str:
        """What there is to tell about it, a sentence."""
        if not self.packed:
            return "refining did not help on text set apart, nothing was changed"
        return f"refined: KLD {self.before:.4g} → {self.after:.4g} nats/token on calibration text set apart"


class _Matrix:
    """One quantized tensor as a function of what is learned: weight = scale · part + minimum · part, by block."""

    def __init__(self, checkpoint: Checkpoint, name: str, packed: npt.NDArray[np.uint8], fmt: type[Format]) -> None:
        import torch

        info = checkpoint.info(name)
        self.numbers = Parameters(packed, fmt)
        rows, columns = self.numbers.weight.shape
        lowest = _minimums(self.numbers)
        order = row_order(checkpoint, name)  # rows of one expert
        self._place = np.concatenate([e * len(order) + order for e in range(info.experts)])
        self.shape = info.shape
        self._block = fmt.elements
        self._parts = [torch.from_numpy(part[self._place]) for part in (self.numbers.weight - lowest, lowest)]
        count = 2 if self.numbers.has_minimum else 1
        self.learned = [torch.ones(rows, columns // self._block, 1).requires_grad_(True) for _ in range(count)]
        self._parts = self._parts[:count]

    def value(self) -> torch.Tensor:
        """The weight, in transformers' order of rows: float32 of the tensor's shape."""
        total: Any = 0
        for factor, part in zip(self.learned, self._parts, strict=True):
            total = total + factor * part.reshape(*factor.shape[:2], self._block)
        return total.reshape(self.shape)

    def pack(self) -> npt.NDArray[np.uint8]:
        """Bytes with the learned scales, rounded to half precision."""
        back = np.argsort(self._place)
        factors = [factor.detach().numpy()[back, :, 0] for factor in self.learned]
        self.numbers.block_scale *= factors[0]
        if len(factors) > 1:
            self.numbers.block_minimum *= factors[1]
        return self.numbers.pack()


def _minimums(numbers: Parameters) -> npt.NDArray[np.float32]:
    """The part of every weight that is its group's minimum: float32 (rows, columns)."""
    if not numbers.has_minimum:
        return np.zeros_like(numbers.weight)
    per = numbers.block // numbers.group
    by_group = np.repeat(numbers.block_minimum, per, axis=1)
    if numbers.minimum.shape[1]:
        by_group = by_group * numbers.minimum.astype(np.float32)
    return np.repeat(by_group, numbers.group, axis=1)


def check_refinable(checkpoint: Checkpoint) -> None:
    """Raise PlanError if a model is too large to be refined."""
    if checkpoint.n_weights > LARGEST:
        raise PlanError(
            f"refining needs the model in memory four times; {checkpoint.n_weights / 1e9:.1f}B weights are too many",
            hint="use --effort 3",
        )


class Refinement:
    """A model whose quantized tensors follow what is learned, beside the original."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, packed: Packed) -> None:
        """packed: bytes of every quantized tensor as the plan says, uint8 (rows, bytes per row).

        Raises PlanError if the model is too large.
        """
        check_refinable(checkpoint)
        self.checkpoint = checkpoint
        self._teacher = materialized_model(checkpoint)
        self._decoded = decode_all(checkpoint, plan, packed)
        self._fixed = materialized_model(checkpoint, self._read)
        self.matrices: dict[str, _Matrix] = {}
        for name, rows in packed.items():
            fmt = get_format(plan.tensors[name].format)
            if LdlqEncoder().writes(fmt) and fmt.scale_table is None:
                self.matrices[name] = _Matrix(checkpoint, name, rows, fmt)
        self._parameters: dict[str, list[str]] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        for parameter, value in self._fixed.named_parameters():
            if parameter == "lm_head.weight" and checkpoint.tied:
                continue
            names = tensor_names(checkpoint, parameter)
            if any(name in self.matrices for name in names):
                self._parameters[parameter] = names
            elif value.ndim == 1 and any(word in parameter for word in LEARNED_VECTORS):
                self.vectors[parameter] = value.detach().clone().requires_grad_(True)

    def _values(self) -> dict[str, torch.Tensor]:
        import torch

        out: dict[str, torch.Tensor] = dict(self.vectors)
        for parameter, names in self._parameters.items():
            parts = [self.matrices[n].value() if n in self.matrices else self._constant(n) for n in names]
            out[parameter] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if parameter == "model.embed_tokens.weight" and self.checkpoint.tied:
                out["lm_head.weight"] = out[parameter]
        return out

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as the plan gives it back."""
        return self._decoded[name] if name in self._decoded else self.checkpoint.read(name)

    def _constant(self, name: str) -> torch.Tensor:
        """A tensor beside a learned one in a fused parameter (experts, whose rows are in the file's order)."""
        import torch

        return torch.from_numpy(self._read(name))

    def divergence(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """KL divergence from the original of every token of windows (n, window), differentiable: (tokens,)."""
        import torch

        tokens = torch.from_numpy(ids)
        with torch.no_grad():
            wanted = self._teacher(tokens, attention_mask=None).logits.flatten(0, 1).log_softmax(-1)
        given = torch.func.functional_call(self._fixed, self._values(), (tokens,), {"attention_mask": None}).logits
        return torch.nn.functional.kl_div(given.flatten(0, 1).log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)

    def mean(self, windows: npt.NDArray[np.int64]) -> float:
        """Mean KL divergence over windows, nats per token."""
        import torch

        with torch.no_grad():
            return float(np.mean([float(self.divergence(windows[i : i + 1]).mean()) for i in range(len(windows))]))

    def train(self, windows: npt.NDArray[np.int64], epochs: float, progress: Progress, seed: int = 0) -> None:
        """Adam with a cosine over ``epochs`` passes of the windows in a fixed random order."""
        import torch

        scales = [factor for matrix in self.matrices.values() for factor in matrix.learned]
        groups = [{"params": scales, "rate": SCALE_RATE}, {"params": list(self.vectors.values()), "rate": VECTOR_RATE}]
        optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.99))
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(windows)) for _ in range(math.ceil(epochs))])
        steps = max(1, int(epochs * len(windows)) // BATCH)
        task = progress.task("refine", total=steps * BATCH * windows.shape[1], unit="tokens")
        for step in range(steps):
            pace = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * pace
            with torch.enable_grad():
                self.divergence(windows[order[step * BATCH : (step + 1) * BATCH]]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            task.advance(BATCH * windows.shape[1])
        task.done()

    def pack(self) -> Packed:
        """Bytes of everything learned, vectors as F32."""
        out = {name: matrix.pack() for name, matrix in self.matrices.items()}
        for parameter, value in self.vectors.items():
            name = tensor_names(self.checkpoint, parameter)[0]
            back = np.argsort(row_order(self.checkpoint, name))
            out[name] = np.ascontiguousarray(value.detach().numpy()[back], "<f4").view(np.uint8).reshape(1, -1)
        return out


def refine(
    checkpoint: Checkpoint, plan: Plan, packed: Packed, train: npt.NDArray[np.int64], apart: npt.NDArray[np.int64],
    epochs: float, progress: Progress | None = None,
) -> Refined:  # fmt: skip
    """Learn scales and vectors on ``train`` windows; kept only if the windows set apart are closer to the original.

    packed: bytes of every quantized tensor. Returns what changed (nothing if it did not help). Raises PlanError if
    the model is too large.
    """
    refinement = Refinement(checkpoint, plan, packed)
    before = refinement.mean(apart)
    refinement.train(train, epochs, progress or Progress())
    after = refinement.mean(apart)
    return Refined(refinement.pack() if after < before else {}, before, min(before, after))


@fast_float32()
def refined(
    checkpoint: Checkpoint,
    plan: Plan,
    stats: ActivationStats,
    text: CalibrationText,
    work: Path,
    epochs: float,
    progress: Progress,
    given: Mapping[str, npt.NDArray[np.uint8]] | None = None,
) -> Refined:
    """``refine`` on a calibration text, its result kept in the work directory for the next run of the same plan.

    given: bytes of tensors that are not to be encoded plainly.
    """
    key = hashlib.sha256(f"{plan.to_json()} {epochs} {checkpoint.stamp} {stats.moments.key if stats.moments else ''}".encode())
    key.update(text.train.tobytes() + text.dev.tobytes())
    for name in sorted(given or {}):
        key.update(name.encode() + given[name].tobytes())  # type: ignore[index]
    path = work / f"refined-{key.hexdigest()[:16]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError), np.load(path, allow_pickle=False) as known:
        before, after = known[KLD]
        return Refined({name: known[name] for name in known.files if name != KLD}, float(before), float(after))
    packed = encode_all(checkpoint, plan, stats, work / TENSORS, progress, given)
    apart = text.dev[:: max(1, text.dev.size // APART_TOKENS)]
    found = refine(checkpoint, plan, packed, text.train, apart, epochs, progress)
    arrays: dict[str, Any] = {KLD: np.array([found.before, found.after]), **found.packed}
    part = path.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, **arrays)
    part.replace(path)
    return found
