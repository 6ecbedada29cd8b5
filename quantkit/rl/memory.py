"""What a step of training needs, in bytes: by formula, and measured.

The formula counts the tensors that are alive at the peak of a step, from the model's sizes. Its factors are those of
transformers' Llama and Qwen layers on quantkit's packed maps, counted once with ``measured_step`` (tests compare them).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint import Checkpoint
from quantkit.kernels.product import PANEL
from quantkit.planning.memory import Shape

ADAPTER = 16  # bytes of a trained number: itself, its gradient and two moments of Adam, float32
HEAD_CHUNK = 4096  # logits of a token that exist at a time
HEAD_COPIES, DRAWN_COPIES = 3, 8  # tensors of logits that are alive together, float32: while training, while drawing


@dataclass(frozen=True)
class Step:
    """sequences: in memory while training. prompt, completion: tokens of each. drawn: completions that are drawn together (the
    engine takes 64 at a time).

    itemsize: bytes of an activation (2: bfloat16, 4: float32). saving: only each layer's input is kept (``save_memory``).
    offloaded: and that on the CPU. reference: a copy of the adapter as it began, which a divergence needs.
    """

    sequences: int = 8
    prompt: int = 256
    completion: int = 256
    drawn: int = 64
    rank: int = 16
    experts: bool = False
    itemsize: int = 4
    saving: bool = False
    offloaded: bool = False
    reference: bool = False
    panels: bool = False

    @property
    def tokens(self) -> int:
        """Of a whole sequence."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class StepMemory:
    """Bytes. weights: of the base. adapter: with gradients and optimizer. drawing, training: what comes on top, one or the other."""

    weights: int
    adapter: int
    drawing: int
    training: int

    @property
    def peak(self) -> int:
        """Most that is alive at a time."""
        return self.weights + self.adapter + max(self.drawing, self.training)

    @property
    def second_copy(self) -> int:
        """What an engine with weights of its own would add for drawing completions: the base and the adapter once more."""
        return self.weights + self.adapter // 4


def step_memory(shape: Shape, weights: int, step: Step) -> StepMemory:
    """The formula. weights: bytes of the base in memory."""
    adapter = adapter_size(shape, step.rank, step.experts)
    tokens = step.sequences * step.tokens
    training = tokens * max(_head(shape), _layer(shape, step)) + tokens * _kept(shape, step)
    if step.panels:
        training += PANEL * step.itemsize
    cache = 2 * shape.layers * shape.kv_heads * shape.head * step.itemsize
    drawing = step.drawn * (step.tokens * cache + max(step.prompt * _reading(shape, step), DRAWN_COPIES * 4 * shape.vocabulary))
    return StepMemory(weights, adapter * (ADAPTER + 4 * step.reference), drawing, training)


def adapter_size(shape: Shape, rank: int, experts: bool) -> int:
    """Numbers of an adapter on all maps of attention and feed-forward layers (of every routed expert, if asked for)."""
    w, q, kv = shape.width, shape.heads * shape.head, shape.kv_heads * shape.head
    sums = 2 * (w + q) + 2 * (w + kv)
    inner = shape.shared_ffn if shape.experts else shape.ffn
    sums += 3 * (w + inner) if inner else 0
    sums += 3 * shape.experts * (w + shape.expert_ffn) if experts else 0
    return shape.layers * rank * sums


def _reading(shape: Shape, step: Step) -> int:
    """Bytes a token while a prompt is read, besides keys and values: one layer's, without gradients."""
    if shape.experts:
        return step.itemsize * (shape.used * shape.expert_ffn + (6 + 4 * shape.used) * shape.width)
    return step.itemsize * (3 * shape.ffn + 5 * shape.width)


def _head(shape: Shape) -> int:
    """Bytes a token while the head's log-probabilities are computed."""
    return HEAD_COPIES * 4 * min(HEAD_CHUNK, shape.vocabulary)


def _attention(shape: Shape, step: Step) -> int:
    """Bytes a token of what one layer's attention keeps of q, k and v; a norm of them keeps copies in float32."""
    both = (shape.heads + shape.kv_heads) * shape.head
    normed = "qwen3" in shape.arch
    return both * (8 + 4 * normed if step.itemsize == 4 else 4 + 4 * normed)


def _layer(shape: Shape, step: Step) -> int:
    """Bytes a token of the layer whose gradient is being computed, beyond what all layers keep."""
    w, f, half = shape.width, shape.shared_ffn if shape.experts else shape.ffn, step.itemsize == 2
    routed = 0
    if shape.experts:
        routed = shape.used * (shape.expert_ffn * (14 if half else 28) + w * (2 if half else 4))
    if not step.saving:
        return max(20 * w, (4 if half else 8) * f, routed)
    return (12 if half else 16) * w + (12 if half else 24) * f + _attention(shape, step) + routed + (10 if routed else 0) * w


def _kept(shape: Shape, step: Step) -> int:
    """Bytes a token of what all layers keep for the gradient."""
    w, f, half = shape.width, shape.shared_ffn if shape.experts else shape.ffn, step.itemsize == 2
    if step.saving:
        return (0 if step.offloaded else step.itemsize * shape.layers * w) + (6 if half else 8) * w
    layer = (10 if half else 16) * w + (8 if half else 16) * f + _attention(shape, step)
    if shape.experts:
        layer += shape.used * w * (4 if half else 8) - (8 * w if not f else 0)
        layer += shape.used * shape.expert_ffn * (8 if half else 16) * step.experts
    return shape.layers * layer + (6 if half else 8) * w


def weights_in_memory(checkpoint: Checkpoint, itemsize: int) -> int:
    """Bytes of a model's tensors as ``packed_model`` holds them: packed ones as they are, others in the type of activations.

    What a folder keeps beside a quantized tensor, its scales, counts as it lies on the disk.
    """
    plain = [info for info in checkpoint.tensors.values() if info.dtype in checkpoint.plain_types]
    total = itemsize * sum(info.size for info in plain)
    if len(plain) == len(checkpoint.tensors):
        return total
    known = {info.name for info in plain}
    return total + sum(checkpoint.nbytes(name) for name in checkpoint.tensors if name not in known)


def measured_step(base: Path, step: Step, device: str = "cpu") -> StepMemory:
    """The same, measured with random tokens: bytes of tensors on the CPU, of the allocator on a GPU. Raises a QuantkitError."""
    from quantkit.rl.plugin_memory import measure

    return measure(base, step, device)
