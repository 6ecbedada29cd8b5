"""Layers that keep packed bytes: QuantLinear, QuantEmbedding, QuantExperts. Imported only inside functions: it needs torch.

Parameters are the file's own bytes, uint8, which no change of type touches. On a GPU the bytes of some formats lie in
another order (kernels/repack.py); a state dict always has the file's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from quantkit.errors import FormatError
from quantkit.formats.tensors.blocks import packed_format
from quantkit.kernels import ops, repack
from quantkit.kernels.decoders import tables
from quantkit.kernels.packing import PLANES, Packing

# Notes at a parameter whose bytes were repacked: that they were, and a weak reference to them as in the file.
MOVED, FILE_BYTES = "quantkit_planes", "quantkit_file_bytes"
PLAIN = ""  # in place of a format's name: the parameter is not packed


class Packed(nn.Module):
    """A module with packed parameters. formats: parameter → format's name, or PLAIN."""

    def __init__(self, formats: dict[str, str]) -> None:
        super().__init__()
        for name in formats.values():
            if name != PLAIN and packed_format(name).codes is None:
                raise FormatError(f"{name} has no blocks to keep packed", hint="use torch's own layers")
        self.formats = dict(formats)

    def packing(self, name: str) -> str:
        """How the bytes of a parameter are to be read, as the operators take it."""
        return self.formats[name] + (PLANES if getattr(self._parameters[name], MOVED, False) else "")

    def lay_out(self, planes: Callable[[str, Tensor], bool] | None = None) -> None:
        """Give every parameter the order of bytes that its device reads fastest, or the one that ``planes`` says.

        The order is noted at the parameter, because two modules may share one (a tied head).
        """
        for name, data in self._parameters.items():
            if data is None or self.formats.get(name, PLAIN) == PLAIN or data.device.type == "meta":
                continue
            fmt, on_gpu = packed_format(self.formats[name]), data.device.type == "cuda"
            wanted = planes(name, data) if planes else on_gpu and repack.gains(fmt)
            if wanted != getattr(data, MOVED, False):
                data.data = repack.pack(data.data, fmt) if wanted else repack.unpack(data.data, fmt)
                setattr(data, MOVED, wanted)
                setattr(data, FILE_BYTES, None)
            if on_gpu:  # now, and not while a CUDA graph is being captured
                tables(fmt, str(data.device))  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.lay_out(_as_in_the_file)  # a parameter may be made anew, without its note
        super()._apply(fn, recurse)
        self.lay_out()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, data in self._parameters.items():
            if data is not None and getattr(data, MOVED, False):
                destination[prefix + name] = _file_bytes(data, self.formats[name])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.lay_out(_as_in_the_file)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.lay_out()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": [name for name, data in self._parameters.items() if getattr(data, MOVED, False)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        moved = state.pop("_moved", [])  # copies of parameters lose their notes
        super().__setstate__(state)
        for name in moved:
            setattr(self._parameters[name], MOVED, True)


def _file_bytes(data: Tensor, fmt: str) -> Tensor:
    """The bytes of a repacked parameter in the file's order; the same tensor for all modules that share it."""
    version, kept = getattr(data, FILE_BYTES, None) or (None, lambda: None)
    found = kept() if version == data._version else None
    if found is None:
        found = repack.unpack(data.data, packed_format(fmt))
        setattr(data, FILE_BYTES, (data._version, weakref.ref(found)))
    return found


def _as_in_the_file(name: str, data: Tensor) -> bool:
    return False


def frozen(value: Tensor) -> nn.Parameter:
    """A parameter without a gradient."""
    return nn.Parameter(value, requires_grad=False)


class QuantLinear(Packed):
    """x · Wᵀ + bias. weight: uint8 (out_features, bytes of a row); bias: (out_features,) or None.

    Not a ``nn.Linear``, so that nobody adds floating-point numbers to the bytes.
    """

    def __init__(self, weight: Tensor, format: str, bias: Tensor | None = None) -> None:
        super().__init__({"weight": format})
        self.weight = frozen(weight)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        self.in_features = Packing.of(format).columns(weight)
        self.out_features = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = ops.linear(x, self.weight, self.packing("weight"))
        return out if self.bias is None else out + self.bias

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, (out_features, in_features)."""
        return ops.dequantize(self.weight, self.packing("weight"), dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.formats['weight']}, bias={bias}"


class QuantMLP(nn.Module):
    """transformers' gated feed-forward layer: down(act(gate(x)) ∘ up(x)), gate and up in one product where that can be.

    It can for SiLU, packed gate and up without biases, and inputs that want no gradient: with one, their outputs are
    better kept than made again. Whatever takes the place of a map later (PEFT's LoRA) is called, and hooks are too.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if _can_be_fused(gate) and _can_be_fused(up) and not (torch.is_grad_enabled() and x.requires_grad):
            return self.down_proj(ops.swiglu(x, gate.weight, up.weight, gate.packing("weight"), up.packing("weight")))
        return self.down_proj(self.act_fn(gate(x)) * up(x))


def _can_be_fused(module: nn.Module) -> TypeGuard[QuantLinear]:
    """Whether calling a map does nothing but its product: no hooks, nor accelerate's way of putting another forward there."""
    plain = type(module) is QuantLinear and module.bias is None and "forward" not in module.__dict__
    return plain and not module._forward_hooks and not module._forward_pre_hooks


class QuantEmbedding(Packed):
    """Rows of a packed table. weight: uint8 (num_embeddings, bytes of a row); rows are decoded to the module's type."""

    def __init__(self, weight: Tensor, format: str, dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> None:
        super().__init__({"weight": format})
        self.weight = frozen(weight)
        self.num_embeddings, self.embedding_dim = len(weight), Packing.of(format).columns(weight)
        self.padding_idx = padding_idx
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)  # its type is ours

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight, self.packing("weight"), self._like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.formats['weight']}"


class QuantExperts(Packed):
    """Routed experts, with the inputs and output of transformers' own: down(act(gate · x) ∘ (up · x)) for the experts chosen.

    gate_proj, up_proj: (experts, width, bytes); down_proj: (experts, hidden, bytes); each uint8 in a format of its own,
    or floating point (PLAIN). change: what every product's input goes through first, for example rounding; None: nothing.
    """

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    change: Callable[[Tensor], Tensor] | None = None

    def __init__(self, tensors: dict[str, Tensor], formats: dict[str, str], activation: str = "silu") -> None:
        super().__init__(formats)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, frozen(tensors[name]))
        self.num_experts, self.activation = len(tensors["gate_proj"]), activation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), expert numbers and their weights (tokens, k) → (tokens, hidden)."""
        return self.routed(hidden_states, top_k_index, top_k_weights)

    def sizes(self, name: str) -> tuple[int, int]:
        """Rows and columns of each expert's matrix."""
        weight = getattr(self, name)
        packed = self.formats[name] != PLAIN
        return weight.shape[1], Packing.of(self.formats[name]).columns(weight) if packed else weight.shape[2]

    def routed(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
        addition: Callable[[str, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """``forward``, where ``addition`` gives what is added to a product: (its name, tokens sorted by expert, their ends)."""
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = (chosen[:, None] == torch.arange(self.num_experts, device=chosen.device)).sum(0)
        ends = torch.cumsum(counts, 0).int()
        x = hidden_states[order // top_k_index.shape[1]]
        inside = self._inside(x, ends, addition)
        out = self._product(inside, "down_proj", ends, addition)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out = out[back].reshape(*top_k_index.shape, -1)
        return (out * top_k_weights[..., None].to(out.dtype)).sum(1)

    def fused(self) -> bool:
        """Whether gate and up are one product, with SiLU."""
        packed = PLAIN not in (self.formats["gate_proj"], self.formats["up_proj"])
        return packed and self.change is None and self.activation in ("silu", "swish")

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        """x · Wᵀ of a part, tokens sorted by expert."""
        weight = getattr(self, name)
        packed = self.formats[name] != PLAIN
        return ops.grouped(x, weight, self.packing(name), ends) if packed else ops.grouped_plain(x, weight, ends)

    def _inside(self, x: Tensor, ends: Tensor, addition: Any) -> Tensor:
        """What goes into the last product."""
        if addition is None and self.fused():
            return ops.swiglu(x, self.gate_proj, self.up_proj, self.packing("gate_proj"), self.packing("up_proj"), ends)
        from transformers.activations import ACT2FN

        return ACT2FN[self.activation](self._product(x, "gate_proj", ends, addition)) * self._product(
            x, "up_proj", ends, addition
        )

    def _product(self, x: Tensor, name: str, ends: Tensor, addition: Any) -> Tensor:
        x = x if self.change is None else self.change(x)
        out = self.product(x, name, ends)
        return out if addition is None else out + addition(name, x, ends)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, " + ", ".join(f"{name}: {fmt or 'plain'}" for name, fmt in self.formats.items())
