"""Peak memory of a step of training. Imported only inside functions: it needs torch and peft."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit.modeling.training import save_memory, token_scores
from quantkit.rl.base import open_base
from quantkit.rl.memory import Step, StepMemory
from quantkit.rl.plugin_peft import DEFAULT_TARGETS, EXPERTS, lora_config, with_new_adapter
from quantkit.rl.rollouts import Sampling, TorchEngine

FIRST_TOKEN = 3


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active and still alive; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def measure(base: Path, step: Step, device: str) -> StepMemory:
    """Draw and train once with random tokens. Raises a QuantkitError."""
    opened = open_base(base, torch.bfloat16 if step.itemsize == 2 else None, device)
    targets = DEFAULT_TARGETS + ((EXPERTS,) if step.experts else ())
    weights = sum(size for _, size in _storages(opened.model))
    model: Any = with_new_adapter(opened.model, lora_config(opened.model, step.rank, None, targets))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    if step.saving:
        save_memory(model.get_base_model())
    size = opened.model.config.vocab_size
    ids = torch.randint(FIRST_TOKEN, size, (step.sequences, step.tokens), device=device)

    def train() -> None:
        inner = model.train().get_base_model()
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        scores = token_scores(hidden.reshape(-1, hidden.shape[-1]), inner.get_output_embeddings(), ids[:, 1:].reshape(-1))
        (-scores.log_probabilities.mean()).backward()
        model.zero_grad()

    def draw() -> None:
        prompts = torch.randint(FIRST_TOKEN, size, (step.drawn, step.prompt)).tolist()
        TorchEngine(step.drawn).complete(model.eval(), prompts, Sampling(step.completion, 1.0, [size], 0))

    train()  # tables and compiled code are made
    drawing, training = (_peak(function, device) for function in (draw, train))
    return StepMemory(weights, (16 + 4 * step.reference) * trained, drawing, max(0, training - 4 * trained))


def _storages(model: Any) -> set[tuple[int, int]]:
    """Every storage of a model once, with its bytes."""
    values = [*model.parameters(), *model.buffers()]
    return {(value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()) for value in values}


def _peak(function: Callable[[], None], device: str) -> int:
    """Most bytes that a call has at a time beyond what was there."""
    gc.collect()
    if device == "cpu":
        with LiveBytes() as counter:
            function()
        return counter.peak
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before
