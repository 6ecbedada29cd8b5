"""What training on packed weights needs to fit: log-probabilities in parts of the vocabulary, activations kept on the CPU.

Imported only inside functions: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from quantkit.kernels import ops
from quantkit.modeling.modules import QuantLinear

CHUNK = 4096  # rows of the head that are multiplied at a time
IGNORED = -100


def _rows(weight: Tensor, packing: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows of the head, decoded if they are packed: (last − first, hidden)."""
    if not packing:
        return weight[first:last].to(dtype)
    return ops.embedding(torch.arange(first, last, device=weight.device), weight, packing, dtype)


class _Scores(torch.autograd.Function):
    """Of softmax((hidden · Wᵀ + b) / temperature): see ``TargetScores``.

    Each (tokens,). Only the first has a gradient, for which the logits are made again.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, packing: str, size: int, chunk: int, temperature: float) -> Any:  # fmt: skip
        total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        chosen, mean, plain, largest = torch.zeros_like(total), torch.zeros_like(total), torch.zeros_like(total), total
        for first in range(0, size, chunk):
            logits = _logits(hidden, weight, bias, packing, first, min(first + chunk, size)).div_(temperature)
            part, before = logits.logsumexp(1), total
            total = torch.logaddexp(total, part)
            inner = torch.linalg.vecdot(torch.exp(logits - part[:, None]), logits)  # mean logit of this part
            mean = torch.where(before.isinf(), inner, mean * torch.exp(before - total) + inner * torch.exp(part - total))
            plain = plain + logits.sum(1) / size
            largest = torch.maximum(largest, logits.amax(1))
            inside = (targets >= first) & (targets < first + logits.shape[1])
            place = (targets - first).clamp(0, logits.shape[1] - 1)
            chosen = torch.where(inside, logits.gather(1, place[:, None])[:, 0], chosen)
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        ctx.facts = packing, size, chunk, temperature
        entropy, likeliest = total - mean, chosen >= largest
        ctx.mark_non_differentiable(entropy, likeliest, plain)
        return chosen - total, entropy, likeliest, plain

    @staticmethod
    @once_differentiable
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        hidden, weight, bias, targets, total = ctx.saved_tensors
        packing, size, chunk, temperature = ctx.facts
        back = torch.zeros_like(hidden, dtype=torch.float32)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for first in range(0, size, chunk):
            last = min(first + chunk, size)
            logits = _logits(hidden, weight, bias, packing, first, last)
            share = -(logits.div_(temperature) - total[:, None]).exp_()  # −softmax
            inside = (targets >= first) & (targets < last)
            place = (targets - first).clamp(0, last - first - 1)
            share.scatter_add_(1, place[:, None], inside[:, None].float())
            share *= grad[:, None] / temperature
            back += share @ _rows(weight, packing, first, last, torch.float32)
            if to_weight is not None:
                to_weight[first:last] = share.T @ hidden.float()
            if to_bias is not None:
                to_bias[first:last] = share.sum(0)
        cast = [None if value is None else value.to(like.dtype) for value, like in ((to_weight, weight), (to_bias, bias))]
        return back.to(hidden.dtype), *cast, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, packing: str, first: int, last: int) -> Tensor:
    """Some columns of the logits, float32 (tokens, last − first)."""
    logits = (hidden @ _rows(weight, packing, first, last, hidden.dtype).T).float()
    return logits if bias is None else logits + bias[first:last].float()


@dataclass(frozen=True)
class TargetScores:
    """Of each target: its log-probability and the entropy of its distribution in nats, whether none is likelier, the mean logit."""

    log_probabilities: Tensor
    entropy: Tensor
    likeliest: Tensor
    mean_logit: Tensor


def token_scores(hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK) -> TargetScores:
    """What a model thinks of tokens, without logits of the whole vocabulary.

    hidden: (..., width), what goes into ``head`` (nn.Linear or QuantLinear); targets: (...) token ids; temperature:
    logits are divided by it. At most (tokens, chunk) logits exist at a time. The log-probabilities have gradients for
    hidden, and for the head's own weights if they are trained.
    """
    if isinstance(head, QuantLinear):
        packing, size, bias = head.packing("weight"), head.out_features, head.bias
    elif isinstance(head, nn.Linear):
        packing, size, bias = "", head.out_features, head.bias
    else:
        raise TypeError(f"a head of type {type(head).__name__} is none that can be taken in parts; give nn.Linear or QuantLinear")
    found = _Scores.apply(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, bias, targets.reshape(-1), packing, size, chunk, temperature
    )
    return TargetScores(*(value.reshape(targets.shape) for value in found))


def token_log_probabilities(hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Log-probabilities of tokens, float32 (...): see ``token_scores``."""
    return token_scores(hidden, head, targets, chunk=chunk).log_probabilities


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, count: Tensor | int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Mean cross-entropy over the labels that are not IGNORED; see ``token_log_probabilities``.

    hidden[..., i, :] predicts labels[..., i]: shift them first. count: divide by this many tokens instead, so that
    accumulated batches weigh every token alike.
    """
    kept = labels.reshape(-1) != IGNORED
    flat = hidden.reshape(-1, hidden.shape[-1])[kept]
    losses = -token_log_probabilities(flat, head, labels.reshape(-1)[kept], chunk)
    return losses.sum() / (count if count is not None else max(len(losses), 1))


class _Distilled(torch.autograd.Function):
    """Σ KL(teacher ‖ student) over tokens; the gradient for the student's hidden states is made on the way."""

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, hidden: Tensor, head: Any, teacher: Tensor, teacher_head: Any, chunk: int) -> Tensor:
        total, back = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            given = torch.log_softmax(head(hidden[part]).float(), -1)
            wanted = torch.log_softmax(teacher_head(teacher[part]).float(), -1)
            total += (wanted.exp() * (wanted - given)).sum()
            slope = (given.exp() - wanted.exp()).to(hidden.dtype)
            packed = isinstance(head, QuantLinear)
            back[part] = ops.linear_transposed(slope, head.weight, head.packing("weight")) if packed else slope @ head.weight
        ctx.save_for_backward(back)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None, None, None


def distillation_loss(hidden: Tensor, head: nn.Module, teacher: Tensor, teacher_head: nn.Module, chunk: int = 256) -> Tensor:
    """Sum over tokens of KL(teacher ‖ student), nats, with logits of ``chunk`` tokens at a time.

    hidden, teacher: (..., width), what goes into the heads (nn.Linear or QuantLinear), which are not trained.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), teacher.detach().reshape(-1, teacher.shape[-1])
    return _Distilled.apply(flat, head, wanted, teacher_head, chunk)


class Offload:
    """Keeps tensors that are saved for the backward pass on the CPU. The copies run beside the computation."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Start the copy to pinned memory."""
        if tensor.device.type != "cuda" or not tensor.is_floating_point():
            return tensor
        stream = self._streams.get(tensor.device) or self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return kept, tensor.device, stream.record_event()

    def unpack(self, kept: Any) -> Tensor:
        """Bring it back."""
        if isinstance(kept, Tensor):
            return kept
        value, device, done = kept
        torch.cuda.current_stream(device).wait_event(done)
        return value.to(device, non_blocking=True)


_offload = Offload()


def offloaded_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's checkpoint (activations are computed again in the backward pass) whose inputs wait on the CPU."""

    def within(*inputs: Any) -> Any:
        return function(*inputs, **kwargs)

    with torch.autograd.graph.saved_tensors_hooks(_offload.pack, _offload.unpack):
        return checkpoint(within, *args, use_reentrant=True)


def save_memory(model: Any) -> None:
    """Let a transformers model keep only each layer's input while training, and that on the CPU.

    Raises TypeError for a model that does not support checkpointing.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise TypeError(f"{type(model).__name__} does not support gradient checkpointing")
    model.enable_input_require_grads()

    def enable(*_: Any, **__: Any) -> None:  # also for who switches it off and on again, as TRL does
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offloaded_checkpoint)

    model.gradient_checkpointing_enable = enable
    enable()
