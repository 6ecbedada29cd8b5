"""A model run block by block: only one decoder layer's weights are in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.modeling.products import Restore, product, use_bfloat16
from quantkit.modeling.skeleton import empty_model, load_parameters, parameter_value, set_parameter, tensor_names

if TYPE_CHECKING:
    import torch


class Observer(Protocol):
    """Is shown what goes into and comes out of every linear map."""

    def see(self, name: str, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """name: GGUF tensor; x: (tokens, columns) input; y: (…, rows) output, itself and no view; weight: (rows, columns)."""


class Source(Protocol):
    """Gives weights by GGUF tensor name, as a Checkpoint does."""

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start … stop."""


@dataclass(frozen=True)
class Routing:
    """Tokens on their way through one router.

    names: GGUF tensors of its experts (gate, up, down). x: (tokens, width), what the router and the experts see.
    logits: (tokens, experts). chosen, weights: (tokens, k), the experts taken and the gate weights of their outputs.
    """

    names: tuple[str, str, str]
    x: torch.Tensor
    logits: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


class Blocks:
    """Embedding, layers and head of a checkpoint, loaded when used."""

    def __init__(self, checkpoint: Checkpoint, source: Source | None = None, half: bool = False) -> None:
        """source: gives the weights instead of the checkpoint. half: matrices of layers that are stored as BF16 stay so
        and multiply inputs rounded to BF16, as llama.cpp does; everything between them is float32."""
        self.checkpoint = checkpoint
        self.half = half
        self._source: Source = source or checkpoint
        self.model = empty_model(checkpoint)
        self.n_layers = len(self.model.model.layers)

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        """Token ids (n, window) → hidden states (n, window, width). Reads only the rows that occur."""
        import torch

        seen, place = np.unique(ids, return_inverse=True)
        name = "token_embd.weight"
        rows = np.concatenate([self._source.read_rows(name, int(i), int(i) + 1) for i in seen])
        return torch.from_numpy(rows[place.reshape(ids.shape)])

    @contextlib.contextmanager
    def layer(
        self, index: int, observer: Observer | None = None, routing: Callable[[Routing], None] | None = None
    ) -> Iterator[Any]:
        """The decoder layer with its weights; call it with hidden states. Freed on leaving.

        routing: is shown what the layer's router does, before the experts run.
        """
        import torch

        layer = self.model.model.layers[index]
        prefix = f"model.layers.{index}."
        load_parameters(self.checkpoint, layer, prefix, self._source.read)
        handles = _use_bfloat16(self.checkpoint, layer, prefix) if self.half else []
        handles += observe(self.checkpoint, layer, prefix, observer) if observer or self.half else []
        handles += watch_routing(self.checkpoint, layer, prefix, routing) if routing else []

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

    def reload(self, index: int) -> None:
        """Read the weights of a loaded layer again."""
        load_parameters(self.checkpoint, self.model.model.layers[index], f"model.layers.{index}.", self._source.read)

    @contextlib.contextmanager
    def watch(
        self, index: int, observer: Observer, routing: Callable[[Routing], None], middle: Callable[[torch.Tensor], None]
    ) -> Iterator[None]:
        """Observe a loaded layer for a while. middle: is shown the residual stream between attention and feed-forward."""
        layer, prefix = self.model.model.layers[index], f"model.layers.{index}."
        handles = observe(self.checkpoint, layer, prefix, observer) + watch_routing(self.checkpoint, layer, prefix, routing)
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: middle(inputs[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def show_expert(self, index: int, expert: int, x: torch.Tensor, observer: Observer) -> None:
        """Show ``observer`` what one expert of a loaded layer makes of tokens x (tokens, width); nothing flows on."""
        layer = self.model.model.layers[index]
        name, module = next((name, module) for name, module in layer.named_modules() if _is_experts(module))
        names = _expert_names(self.checkpoint, f"model.layers.{index}.{name}")
        _run_expert(module, names, expert, x, observer.see)

    @contextlib.contextmanager
    def final_norm(self) -> Iterator[Any]:
        """The norm in front of the head."""
        norm = self.model.model.norm
        load_parameters(self.checkpoint, norm, "model.norm.", self._source.read)
        try:
            yield norm
        finally:
            norm.to("meta")

    @contextlib.contextmanager
    def head(self, observer: Observer | None = None) -> Iterator[Any]:
        """Final norm and head; call it with hidden states (…, width) to get logits (…, vocabulary)."""
        norm, head = self.model.model.norm, self.model.lm_head
        load_parameters(self.checkpoint, norm, "model.norm.", self._source.read)
        name = "model.embed_tokens.weight" if self.checkpoint.tied else "lm_head.weight"
        set_parameter(head, "weight", parameter_value(self.checkpoint, name, self._source.read))
        name = "token_embd.weight" if self.checkpoint.tied else "output.weight"
        handles = [head.register_forward_hook(_linear_hook(name, observer))] if observer else []
        try:
            yield lambda hidden: head(norm(hidden))
        finally:
            for handle in handles:
                handle.remove()
            head.to("meta")


def _use_bfloat16(checkpoint: Checkpoint, layer: Any, prefix: str) -> list[Any]:
    """Keep the matrices of a loaded layer that are BF16 in the file in BF16; the router stays float32.

    Routed experts need the forward that ``observe`` gives them.
    """
    import torch

    def is_half(names: Iterable[str]) -> bool:
        return all(checkpoint.info(name).dtype == "BF16" for name in names)

    handles: list[Any] = []
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear) and is_half(tensor_names(checkpoint, f"{prefix}{name}.weight")):
            handles.append(use_bfloat16(module))
        elif _is_experts(module) and is_half(_expert_names(checkpoint, f"{prefix}{name}")):
            for stacked in ("gate_up_proj", "down_proj"):
                set_parameter(module, stacked, getattr(module, stacked).data.bfloat16())
    return handles


def observe(checkpoint: Checkpoint, layer: Any, prefix: str, observer: Observer | None) -> list[Any]:
    """Hook every linear map of a layer, routed experts included; returns handles to remove."""
    import torch

    handles: list[Any] = []
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear) and observer is not None:
            tensor = tensor_names(checkpoint, f"{prefix}{name}.weight")[0]
            handles.append(module.register_forward_hook(_linear_hook(tensor, observer)))
        elif _is_experts(module):
            names = _expert_names(checkpoint, f"{prefix}{name}")
            module.forward = MethodType(_experts_forward(names, observer), module)
            handles.append(Restore(module))
    return handles


def watch_routing(checkpoint: Checkpoint, layer: Any, prefix: str, show: Callable[[Routing], None]) -> list[Any]:
    """Call ``show`` whenever tokens pass a router of the layer; returns handles to remove."""
    handles: list[Any] = []
    for name, module in layer.named_modules():
        if not (hasattr(module, "gate") and _is_experts(getattr(module, "experts", None))):
            continue
        logits: list[torch.Tensor] = []

        def keep(_: Any, inputs: Any, output: Any, kept: list[torch.Tensor] = logits) -> None:
            kept[:] = [output[0]]

        def tell(_: Any, inputs: Any, kept: list[torch.Tensor] = logits, path: str = f"{prefix}{name}.experts") -> None:
            x, chosen, weights = inputs
            show(Routing(_expert_names(checkpoint, path), x, kept.pop(), chosen, weights))

        handles += [module.gate.register_forward_hook(keep), module.experts.register_forward_pre_hook(tell)]
    return handles


def _is_experts(module: Any) -> bool:
    return hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")


def _expert_names(checkpoint: Checkpoint, path: str) -> tuple[str, str, str]:
    """GGUF tensors (gate, up, down) of transformers' stacked experts."""
    gate, up = tensor_names(checkpoint, f"{path}.gate_up_proj")
    return gate, up, tensor_names(checkpoint, f"{path}.down_proj")[0]


def linear_weights(layer: Any) -> Iterator[torch.Tensor]:
    """Every weight matrix (rows, columns) of a layer's linear maps and experts, as views; the router is left out."""
    import torch

    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            yield module.weight.data
        elif _is_experts(module):
            for stacked in (module.gate_up_proj.data, module.down_proj.data):
                yield from stacked


def change_inputs(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """Let every linear map of a layer, routed experts included, see ``change(input)``; returns handles to remove."""
    import torch

    handles: list[Any] = []
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:])))
        elif _is_experts(module):
            module.forward = MethodType(_experts_forward(("", "", ""), None, change), module)
            handles.append(Restore(module))
    return handles


def _linear_hook(name: str, observer: Observer | None) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert observer is not None
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        observer.see(name, 0, x, output, module.weight)

    return hook


def _experts_forward(
    names: tuple[str, str, str], observer: Observer | None, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Any:
    """transformers' expert loop, showing the observer what each expert sees, or changing it."""

    def see(*what: Any) -> None:
        if observer is not None:
            observer.see(*what)

    def forward(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import torch

        out = torch.zeros_like(hidden)
        for expert in range(self.gate_up_proj.shape[0]):
            token, slot = torch.where(index == expert)
            if not len(token):
                continue
            y = _run_expert(self, names, expert, hidden[token], see, change)
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out

    return forward


def _run_expert(
    module: Any, names: tuple[str, str, str], expert: int, x: torch.Tensor, see: Callable[..., None],
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """One expert's output for tokens x (tokens, width), before its gate weight."""
    gate_name, up_name, down_name = names
    width = module.gate_up_proj.shape[1] // 2
    x = x if change is None else change(x)
    gate_w, up_w = module.gate_up_proj[expert, :width], module.gate_up_proj[expert, width:]
    gate, up = product(x, gate_w), product(x, up_w)
    see(gate_name, expert, x, gate, gate_w)
    see(up_name, expert, x, up, up_w)
    mid = module.act_fn(gate) * up
    mid = mid if change is None else change(mid)
    y = product(mid, module.down_proj[expert])
    see(down_name, expert, mid, y, module.down_proj[expert])
    return y
