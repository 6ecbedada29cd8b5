"""transformers' Trainer with a teacher. Imported only inside functions: it needs transformers and peft."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Trainer

from quantkit.modeling.modules import QuantLinear
from quantkit.modeling.training import distillation_loss
from quantkit.rl.base import without_adapter
from quantkit.rl.plugin_peft import LoraQuantLinear
from quantkit.rl.plugin_saves import Saves


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What goes into the head, (sequences, tokens, width)."""
    return without_adapter(model).base_model(input_ids=ids, use_cache=False).last_hidden_state


def divergence(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Σ KL(teacher ‖ model) over the tokens, nats."""
    with torch.no_grad():
        wanted = hidden_states(teacher, ids)
    return distillation_loss(
        hidden_states(model, ids), without_adapter(model).get_output_embeddings(), wanted, teacher.get_output_embeddings()
    )


class HealTrainer(Saves, Trainer):
    """Minimizes the divergence from a teacher; every token of a step counts alike."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        ids = inputs["input_ids"]  # batches are equally long; Trainer takes the mean over those of a step
        return divergence(model, self._teacher, ids) / ids.numel()


def mean_divergence(model: Any, teacher: Any, windows: npt.NDArray[np.int64]) -> float:
    """Mean KL divergence of a model from the teacher, nats/token."""
    training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(divergence(model, teacher, torch.from_numpy(ids)[None].to(model.device))) for ids in windows)
    model.train(training)
    return total / windows.size


def begin_with_residual(model: Any, teacher: Any) -> None:
    """Let every pair begin as the best of its rank for what quantizing took from the weight: U √S, √S Vᵀ (LQER, arXiv 2402.02446).

    teacher: with the original weights under the same names.
    """
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraQuantLinear):
            continue
        base, original = module.base_layer, teacher.get_submodule(name)
        weight = original.dequantized() if isinstance(original, QuantLinear) else original.weight.float()
        lost = weight - base.dequantized().to(weight.device)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        rank = min(len(a), *lost.shape)
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        root = s[:rank].sqrt()
        with torch.no_grad():
            a.zero_()
            b.zero_()
            a[:rank] = (root[:, None] * vh[:rank]).to(a)
            b[:, :rank] = (u[:, :rank] * root / module.scaling["default"]).to(b)
