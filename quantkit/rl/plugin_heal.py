"""transformers' Trainer with a teacher. Imported only inside functions: it needs transformers and peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer

from quantkit.analysis.activations import fp4, fp8, int8
from quantkit.modeling.modules import QuantExperts, QuantLinear
from quantkit.modeling.scales import ScaledLinear, Scales, with_scales
from quantkit.modeling.training import distillation_loss
from quantkit.rl.base import without_adapter
from quantkit.rl.plugin_peft import LoraQuantLinear
from quantkit.rl.plugin_saves import Saves

ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"INT8": int8, "FP8": fp8, "FP4": fp4}
GATE = "shared_expert_gate"
VECTORS = ("norm", "bias")  # what learns besides scales: parameters of one axis with these words in their names


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


class _As(nn.Module):
    """A float32 number as the model's own type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._dtype)


class Learned(nn.Module):
    """What learns inside a model, and nothing else: its state is a checkpoint's. The model is not a part of it.

    learns: which norms and biases do, by name. They are kept in float32 (steps are lost in bfloat16); begun: as they were.
    """

    def __init__(self, model: Any, learns: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        model.requires_grad_(False)
        self._model = (model,)
        self.scales: dict[str, Scales] = with_scales(model)
        names = [
            name for name, value in model.named_parameters()
            if value.ndim == 1 and value.is_floating_point() and any(word in name for word in VECTORS) and learns(name)
        ]  # fmt: skip
        self.vectors: dict[str, nn.Parameter] = {name: _float32(model, name) for name in names}
        self.begun = {name: value.detach().clone() for name, value in self.vectors.items()}
        named = dict(self.vectors)
        for name, scales in self.scales.items():
            named |= {f"{name}.{part}": value for part, value in scales.named_parameters()}
        self.learned = nn.ParameterDict({name.replace(".", "/"): value.requires_grad_() for name, value in named.items()})

    def get_base_model(self) -> Any:
        """The whole model."""
        return self._model[0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model[0].device

    def train(self, mode: bool = True) -> Learned:
        self._model[0].train(mode)
        return super().train(mode)


def _float32(model: Any, name: str) -> nn.Parameter:
    """A parameter of the model in float32, from which the model takes its own type."""
    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    value = getattr(module, leaf)
    if value.dtype == torch.float32:
        return value
    setattr(module, leaf, nn.Parameter(value.detach().float()))
    parametrize.register_parametrization(module, leaf, _As(value.dtype), unsafe=True)
    return module.parametrizations[leaf].original


def round_inputs(model: Any, name: str) -> None:
    """Let all maps of a model's layers see inputs rounded to INT8, FP8 (a scale for each token) or FP4 (NVFP4).

    Gradients pass as if nothing was rounded. The head, routers and the gates of shared experts are left alone, as runtimes do.
    """

    def change(x: torch.Tensor) -> torch.Tensor:
        return x + (ROUNDING[name](x.detach()) - x.detach())

    inner = without_adapter(model)
    done: list[str] = []
    for path, module in inner.named_modules():
        if ".layers." not in path or path.endswith(GATE) or any(path.startswith(before + ".") for before in done):
            continue
        if isinstance(module, QuantExperts):
            module.change = change
        elif isinstance(module, nn.Linear | QuantLinear | LoraQuantLinear | ScaledLinear) or hasattr(module, "base_layer"):
            if isinstance(getattr(module, "base_layer", None), QuantExperts):
                module.base_layer.change = change
            else:
                module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
            done.append(path)


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
