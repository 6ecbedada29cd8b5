"""PEFT's LoRA on packed layers. Imported only inside functions: it needs peft.

PEFT puts these layers in the place of ``QuantLinear`` and ``QuantExperts`` itself, once their classes are registered
with its configuration (``lora_config``, ``registered``). The bytes of the base are never touched: nothing is merged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from quantkit.errors import AdapterError
from quantkit.kernels import ops
from quantkit.modeling.modules import QuantExperts, QuantLinear

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = "experts"
PARTS = ("gate_proj", "up_proj", "down_proj")


class _Frozen(nn.Module, LoraLayer):  # type: ignore[misc]
    """What both kinds share: a base whose bytes stay as they are."""

    base_layer: Any
    r: Any
    lora_alpha: Any
    scaling: Any
    use_rslora: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    disable_adapters: Any
    active_adapters: Any
    set_adapter: Any
    update_layer: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **kwargs: Any) -> None:  # fmt: skip
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: packed bytes cannot hold the sum. Raises AdapterError."""
        raise AdapterError(
            "an adapter cannot be merged into packed weights in place",
            hint="`quantkit rl export --merge` decodes, adds and quantizes again",
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _used(self) -> list[str]:
        """Names of the adapters that are added now."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.r]


class LoraQuantLinear(_Frozen):
    """x · Wᵀ + b + scaling · (x · Aᵀ) · Bᵀ, the addition inside the product with the packed bytes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        used = [name for name in self._used() if name in self.lora_A]
        base: QuantLinear = self.base_layer
        if not used:
            return base(x, *args, **kwargs)
        lows, ups = [], []
        for name in used:
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            lows.append(self.lora_dropout[name](x) @ a.to(x.dtype).T * self.scaling[name])  # no float32 copy of x is kept
            ups.append(b.to(x.dtype))
        low, up = (lows[0], ups[0]) if len(used) == 1 else (torch.cat(lows, -1), torch.cat(ups, -1))
        out = ops.linear(x, base.weight, base.packing("weight"), low, up)
        return out if base.bias is None else out + base.bias


class ExpertWeights(nn.Module):
    """One half of the pairs of all experts. weight: (experts, …)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


class LoraQuantExperts(_Frozen):
    """Routed experts, each with pairs of its own for gate, up and down."""

    adapter_layer_names = tuple(f"lora_{half}_{part}" for part in PARTS for half in "AB")

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, None]:
        return base_layer.gate_proj.device, None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Pairs of rank r for every expert; the second half begins as zeros, so that nothing changes."""
        if r <= 0:
            raise AdapterError(f"a rank of {r} makes no adapter", hint="give at least 1")
        if config.lora_dropout:
            raise AdapterError("packed experts take no dropout", hint="set lora_dropout to 0, or leave the experts out")
        base: QuantExperts = self.base_layer
        for part in PARTS:
            rows, columns = base.sizes(part)
            for half, shape in (("A", (r, columns)), ("B", (rows, r))):
                if not hasattr(self, f"lora_{half}_{part}"):
                    setattr(self, f"lora_{half}_{part}", nn.ModuleDict())
                self._half(half, part)[adapter_name] = ExpertWeights(base.num_experts, *shape)
            nn.init.kaiming_uniform_(self._half("A", part)[adapter_name].weight.flatten(0, 1), a=math.sqrt(5))
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _half(self, half: str, part: str) -> Any:
        """The halves of a part's pairs, by adapter."""
        return getattr(self, f"lora_{half}_{part}")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base: QuantExperts = self.base_layer
        return base.routed(hidden_states, top_k_index, top_k_weights, self._addition if self._used() else None)

    def _addition(self, part: str, x: Tensor, ends: Tensor) -> Tensor:
        """What the adapters add to the product of a part, tokens sorted by expert."""
        out: Any = 0
        for name in self._used():
            a, b = (self._half(half, part)[name].weight for half in "AB")
            low = ops.grouped_plain(x, a.to(x.dtype), ends) * self.scaling[name]
            out = out + ops.grouped_plain(low, b.to(x.dtype), ends)
        return out


def registered(config: LoraConfig) -> LoraConfig:
    """The configuration with our layers, which PEFT does not keep in its file."""
    config._register_custom_module({QuantLinear: LoraQuantLinear, QuantExperts: LoraQuantExperts})
    return config


def lora_config(model: Any, rank: int = 16, alpha: int | None = None, targets: tuple[str, ...] = DEFAULT_TARGETS, **options: Any) -> LoraConfig:  # fmt: skip
    """LoRA on the model's linear maps of those names; alpha is twice the rank unless told.

    Raises AdapterError if no map has such a name.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)}
    names |= {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, QuantExperts)}
    found = [name for name in targets if name in names]
    if EXPERTS in targets and EXPERTS not in found:
        raise AdapterError("the model has no packed experts", hint="leave out --experts")
    if not found:
        raise AdapterError(f"the model has no maps named {', '.join(targets)}", hint=f"it has {', '.join(sorted(names))}")
    return registered(LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=found, task_type="CAUSAL_LM", **options))


def with_new_adapter(model: Any, config: LoraConfig) -> PeftModel:
    """The model with an untrained adapter in float32, trainable; everything else is frozen."""
    return get_peft_model(model.requires_grad_(False), registered(config))


def with_adapter(model: Any, folder: str, trainable: bool = False) -> PeftModel:
    """The model with the adapter of a PEFT folder. Raises AdapterError if it is none, or for other layers."""
    try:
        config = LoraConfig.from_pretrained(folder)
        if config.task_type == "SEQ_CLS" and not hasattr(model, "score"):
            raise AdapterError(
                f"{folder} is a reward model, which writes nothing", hint="give an adapter of sft, grpo, dpo or qat"
            )
        return PeftModel.from_pretrained(model.requires_grad_(False), folder, is_trainable=trainable, config=registered(config))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"{folder} does not fit the model ({error})", hint="give the folder that training wrote, and its base"
        ) from None
