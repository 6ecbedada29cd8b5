"""Training on packed weights: the same gradients with less memory."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from kernel_tools import matrix
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

import quantkit
from quantkit.checkpoint import open_checkpoint
from quantkit.formats import get_format
from quantkit.kernels import ops
from quantkit.modeling.modules import QuantLinear
from quantkit.modeling.training import (
    Offload,
    chunked_cross_entropy,
    distillation_loss,
    save_memory,
    token_log_probabilities,
    token_scores,
)
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run

IDS = torch.arange(40, 72)[None]


class Largest(TorchDispatchMode):
    """Remembers the most elements of any floating-point result."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.size = max(self.size, value.numel())
        return out


def heads():
    raw, weight = matrix(get_format("Q4_K"), 1000, 1)
    packed = QuantLinear(raw, "Q4_K", 0.1 * torch.randn(1000))
    plain = nn.Linear(256, 1000)
    plain.weight.data, plain.bias.data = torch.from_numpy(weight).float(), packed.bias.data.clone()
    return packed, plain


@pytest.mark.parametrize("chunk", [64, 300, 5000])
def test_scores_in_parts_are_those_of_whole_logits(chunk):
    """At a temperature: log-probabilities with their gradient, entropies, and whether a target is the likeliest."""
    packed, plain = heads()
    hidden = (torch.randn(2, 9, 256) / 400).requires_grad_()
    logits = plain(hidden) / 0.7
    targets = torch.where(torch.rand(2, 9) < 0.5, logits.argmax(-1), torch.randint(0, 1000, (2, 9)))
    expected, seed = log_softmax(logits, -1), torch.randn(2, 9)
    chosen = expected.gather(-1, targets[..., None])[..., 0]
    for head in (plain, packed):
        found = token_scores(hidden, head, targets, 0.7, chunk)
        assert torch.allclose(found.log_probabilities, chosen, atol=1e-4)
        assert torch.allclose(found.entropy, -(expected.exp() * expected).sum(-1), atol=1e-3)
        assert torch.equal(found.likeliest, targets == logits.argmax(-1))
        assert torch.allclose(found.mean_logit, logits.mean(-1), atol=1e-3)
        mine, theirs = (torch.autograd.grad(out, hidden, seed, retain_graph=True)[0] for out in (found.log_probabilities, chosen))
        assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("chunk", [4, 256])
def test_distillation_in_parts_has_the_gradient_of_the_whole(chunk):
    packed, plain = heads()
    hidden, teacher = (torch.randn(2, 9, 256) / 400).requires_grad_(), torch.randn(2, 9, 256) / 400
    wanted = log_softmax(plain(teacher), -1)
    expected = (wanted.exp() * (wanted - log_softmax(plain(hidden), -1))).sum()
    theirs = torch.autograd.grad(3 * expected, hidden)[0]
    for head in (plain, packed):
        found = distillation_loss(hidden, head, teacher, plain, chunk)
        assert torch.allclose(found, expected, rtol=1e-4)
        assert torch.allclose(torch.autograd.grad(3 * found, hidden)[0], theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("chunk", [64, 300, 5000])
def test_log_probabilities_in_parts_are_those_of_whole_logits(chunk):
    packed, plain = heads()
    hidden = (torch.randn(2, 9, 256) / 400).requires_grad_()
    targets = torch.randint(0, 1000, (2, 9))
    expected = log_softmax(plain(hidden), -1).gather(-1, targets[..., None])[..., 0]
    seed = torch.randn(2, 9)
    expected_gradients = torch.autograd.grad(expected, [hidden, plain.weight, plain.bias], seed)
    found = token_log_probabilities(hidden, plain, targets, chunk)
    assert torch.allclose(found, expected, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(found, [hidden, plain.weight, plain.bias], seed), expected_gradients, strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    found = token_log_probabilities(hidden, packed, targets, chunk)
    assert torch.allclose(found, expected, atol=1e-4)
    (mine,) = torch.autograd.grad(found, [hidden], seed)
    assert torch.allclose(mine, expected_gradients[0], rtol=1e-3, atol=1e-4 * float(mine.abs().max()))


def test_cross_entropy_never_holds_the_whole_vocabulary():
    packed, plain = heads()
    hidden = (torch.randn(200, 256) / 400).requires_grad_()
    labels = torch.randint(0, 1000, (200,))
    labels[::3] = -100
    with Largest() as parts:
        loss = chunked_cross_entropy(hidden, packed, labels, chunk=50)
        loss.backward()
    mine, hidden.grad = hidden.grad.clone(), None
    with Largest() as whole:
        expected = cross_entropy(plain(hidden), labels)
        expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(mine, hidden.grad, atol=1e-4 * float(mine.abs().max()))
    assert whole.size >= 200 * 1000 and parts.size <= 200 * 256
    halves = [
        chunked_cross_entropy(hidden[part], packed, labels[part], count=int((labels >= 0).sum()))
        for part in (slice(0, 80), slice(80, 200))
    ]
    assert torch.allclose(sum(halves), expected, rtol=1e-5)  # accumulated batches weigh every token alike
    assert chunked_cross_entropy(hidden, packed, torch.full((200,), -100)) == 0
    with pytest.raises(TypeError, match="Embedding"):
        token_log_probabilities(hidden, nn.Embedding(3, 256), labels)


def test_checkpointing_keeps_inputs_only_and_the_same_gradients(tmp_path):
    checkpoint = open_checkpoint(tiny.MOE)
    run(checkpoint, uniform_plan(checkpoint, "Q4_K", None), tmp_path / "q4.gguf")
    found = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = quantkit.load(tmp_path / "q4.gguf")
        down, up = nn.Parameter(torch.randn(4, 256) / 16), nn.Parameter(torch.randn(256, 4) / 16)
        base = model.model.layers[1].self_attn.q_proj
        base.forward = lambda x, base=base, down=down, up=up: ops.linear(x, base.weight, base.packing("weight"), x @ down.T, up)
        if saving:
            save_memory(model)
        model.train()
        kept: list[int] = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel() if tensor.is_floating_point() else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = cross_entropy(model(IDS, use_cache=False).logits[0, :-1], IDS[0, 1:])
        loss.backward()
        found.append((loss.detach(), down.grad, up.grad, sum(kept)))
    for mine, theirs in zip(found[1][:3], found[0][:3], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert found[1][3] < 0.5 * found[0][3]
    with pytest.raises(TypeError, match="does not support"):
        save_memory(nn.Linear(2, 2))


class Device:
    """Stands for torch.cuda: notes what is done on which stream."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        device = self

        class Stream:
            def __init__(self, at) -> None:
                device.log.append(f"stream on {at}")

            def wait_stream(self, other) -> None:
                device.log.append("side waits")

            def record_event(self) -> str:
                return "copied"

        class Main:
            def wait_event(self, event) -> None:
                device.log.append(f"main waits for {event}")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda at: Main())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


class OnGpu:
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda", 1)
    shape, dtype = (3,), torch.float32

    def is_floating_point(self) -> bool:
        return True

    def record_stream(self, stream) -> None:
        pass


def test_inputs_wait_on_the_cpu_and_copies_are_awaited(monkeypatch):
    """One stream a device; nothing is read back before its copy is done; what lies on the CPU or holds no numbers stays."""
    device, offload = Device(monkeypatch), Offload()
    target = torch.zeros(3)
    target.copy_ = lambda source, non_blocking: device.log.append(f"copy, waiting: {not non_blocking}")
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: target if how.pop("pin_memory") else None)
    kept = [offload.pack(OnGpu()) for _ in range(2)]
    assert device.log == ["stream on cuda:1", "side waits", "copy, waiting: False", "side waits", "copy, waiting: False"]
    target.to = lambda at, non_blocking: (str(at), non_blocking)
    assert offload.unpack(kept[0]) == ("cuda:1", True) and device.log[-1] == "main waits for copied"
    for plain in (torch.zeros(2), torch.zeros(2, dtype=torch.int64)):
        assert offload.pack(plain) is plain and offload.unpack(plain) is plain
