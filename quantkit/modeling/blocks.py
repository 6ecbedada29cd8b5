"""A model run block by block: only one decoder layer's weights are in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quantkit.checkpoint import Checkpoint
from quantkit.modeling.skeleton import empty_model, load_parameters, parameter_value, set_parameter, tensor_names

if TYPE_CHECKING:
    import torch


class Observer(Protocol):
    """Is shown what goes into and comes out of every linear map."""

    def see(self, name: str, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """name: GGUF tensor; x: (tokens, columns) input; y: (…, rows) output, itself and no view; weight: (rows, columns)."""


class Blocks:
    """Embedding, layers and head of a checkpoint, loaded when used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = empty_model(checkpoint)
        self.n_layers = len(self.model.model.layers)

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        """Token ids (n, window) → hidden states (n, window, width). Reads only the rows that occur."""
        import torch

        seen, place = np.unique(ids, return_inverse=True)
        name = "token_embd.weight"
        rows = np.concatenate([self.checkpoint.read_rows(name, int(i), int(i) + 1) for i in seen])
        return torch.from_numpy(rows[place.reshape(ids.shape)])

    @contextlib.contextmanager
    def layer(self, index: int, observer: Observer | None = None) -> Iterator[Any]:
        """The decoder layer with its weights; call it with hidden states. Freed on leaving."""
        import torch

        layer = self.model.model.layers[index]
        prefix = f"model.layers.{index}."
        load_parameters(self.checkpoint, layer, prefix)
        handles = observe(self.checkpoint, layer, prefix, observer) if observer else []

        def run(hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
            positions = torch.arange(hidden.shape[1]).unsqueeze(0)
            rope = self.model.model.rotary_emb(hidden, positions)
            out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope, past_key_values=cache)
            return out[0] if isinstance(out, tuple) else out

        try:
            yield run
        finally:
            for handle in handles:
                handle.remove()
            layer.to("meta")

    @contextlib.contextmanager
    def head(self, observer: Observer | None = None) -> Iterator[Any]:
        """Final norm and head; call it with hidden states (…, width) to get logits (…, vocabulary)."""
        norm, head = self.model.model.norm, self.model.lm_head
        load_parameters(self.checkpoint, norm, "model.norm.")
        name = "model.embed_tokens.weight" if self.checkpoint.tied else "lm_head.weight"
        set_parameter(head, "weight", parameter_value(self.checkpoint, name, self.checkpoint.read))
        name = "token_embd.weight" if self.checkpoint.tied else "output.weight"
        handles = [head.register_forward_hook(_linear_hook(name, observer))] if observer else []
        try:
            yield lambda hidden: head(norm(hidden))
        finally:
            for handle in handles:
                handle.remove()
            head.to("meta")


def observe(checkpoint: Checkpoint, layer: Any, prefix: str, observer: Observer) -> list[Any]:
    """Hook every linear map of a layer, routed experts included; returns handles to remove."""
    import torch

    handles: list[Any] = []
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            tensor = tensor_names(checkpoint, f"{prefix}{name}.weight")[0]
            handles.append(module.register_forward_hook(_linear_hook(tensor, observer)))
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            names = [n for p in ("gate_up_proj", "down_proj") for n in tensor_names(checkpoint, f"{prefix}{name}.{p}")]
            module.forward = MethodType(_experts_forward(names, observer), module)
            handles.append(_Restore(module))
    return handles


def linear_weights(layer: Any) -> Iterator[torch.Tensor]:
    """Every weight matrix (rows, columns) of a layer's linear maps and experts, as views; the router is left out."""
    import torch

    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            yield module.weight.data
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            for stacked in (module.gate_up_proj.data, module.down_proj.data):
                yield from stacked


def change_inputs(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """Let every linear map of a layer, routed experts included, see ``change(input)``; returns handles to remove."""
    import torch

    handles: list[Any] = []
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:])))
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            module.forward = MethodType(_experts_forward(["", "", ""], None, change), module)
            handles.append(_Restore(module))
    return handles


class _Restore:
    """Takes an instance's own forward away again."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def remove(self) -> None:
        """Restore the class's forward."""
        del self._module.forward


def _linear_hook(name: str, observer: Observer | None) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert observer is not None
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        observer.see(name, 0, x, output, module.weight)

    return hook


def _experts_forward(
    names: list[str], observer: Observer | None, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Any:
    """transformers' expert loop, showing the observer what each expert sees, or changing it."""
    gate_name, up_name, down_name = names

    def see(*what: Any) -> None:
        if observer is not None:
            observer.see(*what)

    def forward(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import linear

        out = torch.zeros_like(hidden)
        width = self.gate_up_proj.shape[1] // 2
        for expert in range(self.gate_up_proj.shape[0]):
            token, slot = torch.where(index == expert)
            if not len(token):
                continue
            x = hidden[token] if change is None else change(hidden[token])
            gate_w, up_w = self.gate_up_proj[expert, :width], self.gate_up_proj[expert, width:]
            gate, up = linear(x, gate_w), linear(x, up_w)
            see(gate_name, expert, x, gate, gate_w)
            see(up_name, expert, x, up, up_w)
            mid = self.act_fn(gate) * up
            mid = mid if change is None else change(mid)
            y = linear(mid, self.down_proj[expert])
            see(down_name, expert, mid, y, self.down_proj[expert])
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out

    return forward
