"""A quantized model in torch without expanding it: transformers' model whose linear maps, embedding and experts stay packed.

Three steps for a GGUF, so that transformers' own loader can take the same way: which parameters are packed
(``formats_of``), layers for them in a model on the meta device (``prepare``), and their bytes (``fill``). Of a folder
(``pack_folder``) the bytes say what a layer's format is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.checkpoint import Checkpoint, GgufCheckpoint, HfCheckpoint
from quantkit.errors import CheckpointError
from quantkit.formats import get_format
from quantkit.formats.tensors.blocks import packed_format, to_blocks
from quantkit.modeling.skeleton import empty_model, parameter_value, row_order, set_parameter, tensor_names

if TYPE_CHECKING:
    import torch

EXPERTS = ("gate_proj", "up_proj", "down_proj")


def packed_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """The model of a checkpoint, ready to run and to generate; what is quantized stays packed.

    dtype: of everything else, and of the activations (float32 by default). Tensors that are not quantized become
    ordinary parameters, so a checkpoint in BF16 gives an ordinary model, and so do the few that no block fits
    (``to_blocks``). Raises CheckpointError if it cannot be read.
    """
    import torch

    from quantkit.modeling.plugin_transformers import mark

    model = empty_model(checkpoint, cache=True)
    prepare(model, formats_of(checkpoint, model))
    done = pack_folder(checkpoint, model)
    formats = packed_formats(model)
    if formats:
        mark(model, formats, rope_divisors(checkpoint))
    fill(checkpoint, model, dtype or torch.float32, done)
    join_gates(model)
    exact = dict(model.model.rotary_emb.named_buffers())  # angles grow with the position: their steps stay float32
    try:
        model.to(dtype or torch.float32)
        for name, buffer in exact.items():
            model.model.rotary_emb.get_buffer(name).data = buffer.data.float()
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{checkpoint.path.name} cannot be put on {device} ({error})", hint="try the device cpu") from None


def formats_of(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Packed parameter → format, for the layers of a model that are quantized in its file; PLAIN for experts' other tensors."""
    import torch

    if not isinstance(checkpoint, GgufCheckpoint):
        return {}
    out: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            parts = {f"{name}.weight": tensor_of(checkpoint, f"{name}.weight")}
        elif is_experts(module):
            parts = {f"{name}.{part}": tensor_of(checkpoint, f"{name}.{part}") for part in EXPERTS}
        else:
            continue
        found = {key: _format(checkpoint, tensor) for key, tensor in parts.items()}
        out.update(found if any(found.values()) else {})
    return out


def is_experts(module: Any) -> bool:
    """Whether a module holds stacked experts as Qwen's: (experts, 2 · width, hidden) and (experts, hidden, width), no bias."""
    import torch

    both, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(both, torch.nn.Parameter) and isinstance(down, torch.nn.Parameter) and both.ndim == down.ndim == 3):
        return False
    transposed = (
        getattr(module, "is_transposed", False) or getattr(module, "has_bias", False) or hasattr(module, "gate_up_proj_bias")
    )
    return not transposed and both.shape[1] == 2 * down.shape[2] and both.shape[2] == down.shape[1]


def tensor_of(checkpoint: Checkpoint, parameter: str) -> str:
    """The GGUF tensor of a packed parameter."""
    if parameter == "lm_head.weight" and checkpoint.tied:
        return "token_embd.weight"
    stem, _, leaf = parameter.rpartition(".")
    if leaf in EXPERTS:
        tensors = tensor_names(checkpoint, f"{stem}.gate_up_proj") + tensor_names(checkpoint, f"{stem}.down_proj")
        return tensors[EXPERTS.index(leaf)]
    return tensor_names(checkpoint, parameter)[0]


def _format(checkpoint: Checkpoint, tensor: str) -> str:
    """Its format's name, PLAIN for float types. Raises CheckpointError for a type that nothing here decodes."""
    from quantkit.modeling.modules import PLAIN

    dtype = checkpoint.info(tensor).dtype
    return PLAIN if dtype in checkpoint.plain_types else get_format(dtype).name


def prepare(model: Any, formats: dict[str, str]) -> None:
    """Put packed layers without bytes in the place of those whose parameters have formats. model: on the meta device."""
    import torch

    from quantkit.modeling.modules import QuantEmbedding, QuantExperts, QuantLinear

    own: dict[str, dict[str, str]] = {}
    for parameter, fmt in formats.items():
        name, _, leaf = parameter.rpartition(".")
        own.setdefault(name, {})[leaf] = fmt
    for name, parts in own.items():
        module = model.get_submodule(name)
        made: torch.nn.Module
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            made = QuantLinear(_without_bytes(parts["weight"], *shape), parts["weight"], module.bias)
        elif isinstance(module, torch.nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
            weight = _without_bytes(parts["weight"], *shape)
            made = QuantEmbedding(weight, parts["weight"], module.weight.dtype, module.padding_idx)
        else:
            shapes = _expert_shapes(module)
            tensors = {
                part: _without_bytes(fmt, *shapes[part]) if fmt else module.down_proj.new_empty(shapes[part])
                for part, fmt in parts.items()
            }
            made = QuantExperts(tensors, parts, getattr(model.config, "hidden_act", "silu"))
        put(model, name, made)


def join_gates(model: Any) -> None:
    """Let feed-forward layers with SiLU and packed maps compute gate and up together; names of parameters stay."""
    import torch

    from quantkit.modeling.modules import QuantLinear, QuantMLP

    names = ("gate_proj", "up_proj", "down_proj")
    for name, module in list(model.named_modules()):
        activation = getattr(module, "act_fn", None)
        children = {child for child, _ in module.named_children()} - {"act_fn"}
        silu = isinstance(activation, torch.nn.SiLU) or type(activation).__name__ == "SiLUActivation"
        if children == set(names) and silu and all(isinstance(getattr(module, part), QuantLinear) for part in names[:2]):
            put(model, name, QuantMLP(module.gate_proj, module.up_proj, module.down_proj, activation))


def _expert_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the three tensors of a layer's experts, (experts, rows, columns)."""
    experts, both, columns = module.gate_up_proj.shape
    return dict.fromkeys(EXPERTS[:2], (experts, both // 2, columns)) | {"down_proj": tuple(module.down_proj.shape)}


def _without_bytes(fmt: str, *shape: int) -> torch.Tensor:
    """Packed bytes on the meta device for weights of a shape."""
    import torch

    return torch.empty(*shape[:-1], packed_format(fmt).row_bytes(shape[-1]), dtype=torch.uint8, device="meta")


def put(model: Any, name: str, module: Any) -> None:
    """Replace a submodule."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def packed_formats(model: Any) -> dict[str, str]:
    """Parameter → format of everything packed in a model, as ``formats_of`` gives it for a file."""
    from quantkit.modeling.modules import Packed

    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, Packed)]
    return {f"{name}.{parameter}": fmt for name, module in packed for parameter, fmt in module.formats.items()}


def pack_folder(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Put packed layers in the place of those that a folder has quantized; returns the parameters that they have."""
    import torch

    from quantkit.modeling.modules import PLAIN, QuantEmbedding, QuantExperts, QuantLinear

    if not isinstance(checkpoint, HfCheckpoint):
        return set()
    done: set[str] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            found = _blocks_of(checkpoint, tensor_of(checkpoint, f"{name}.weight"))
            if found is None:
                continue
            made: Any = (
                QuantLinear(found[1][0], found[0], module.bias)
                if isinstance(module, torch.nn.Linear)
                else QuantEmbedding(found[1][0], found[0], module.weight.dtype, module.padding_idx)
            )
        elif is_experts(module):
            parts = {part: _blocks_of(checkpoint, tensor_of(checkpoint, f"{name}.{part}")) for part in EXPERTS}
            if not any(parts.values()):
                continue
            formats = {part: found[0] if found else PLAIN for part, found in parts.items()}
            shapes = _expert_shapes(module)
            tensors = {part: found[1] if found else module.down_proj.new_empty(shapes[part]) for part, found in parts.items()}
            made = QuantExperts(tensors, formats, getattr(model.config, "hidden_act", "silu"))
        else:
            continue
        put(model, name, made)
        done |= {f"{name}.{parameter}" for parameter, fmt in made.formats.items() if fmt}
    return done


def _blocks_of(checkpoint: HfCheckpoint, tensor: str) -> tuple[str, torch.Tensor] | None:
    """Format and bytes of a folder's tensor, uint8 (experts, rows, bytes of a row); None if it is plain or no block fits."""
    import torch

    found, formats = [], set()
    for parts in checkpoint.quantized_parts(tensor) or ():
        made = to_blocks(parts)
        if made is None:
            return None
        formats.add(made[0].name)
        found.append(made[1])
    if len(formats) != 1:  # none, or experts that differ
        return None
    return formats.pop(), torch.from_numpy(np.stack(found))


def fill(checkpoint: Checkpoint, model: Any, dtype: torch.dtype, done: Collection[str] = ()) -> None:
    """Give every parameter of a prepared model its value, each on the device where it is (the CPU instead of meta).

    done: parameters that have theirs.
    """
    import torch

    from quantkit.modeling.modules import PLAIN

    packed = packed_formats(model)
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if name in done or (name == "lm_head.weight" and checkpoint.tied):
            continue
        if packed.get(name, PLAIN) != PLAIN:
            value = packed_tensor(checkpoint, tensor_of(checkpoint, name))
        elif name in packed:  # experts of which others are packed
            value = torch.from_numpy(checkpoint.read(tensor_of(checkpoint, name))).to(dtype)
        else:
            value = parameter_value(checkpoint, name, checkpoint.read).to(dtype)
        set_parameter(model, name, value.to(old.device if old.device.type != "meta" else "cpu"))
    if checkpoint.tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def packed_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A quantized tensor as it lies in the file, its rows in transformers' order: uint8 (..., rows, bytes)."""
    import torch

    assert isinstance(checkpoint, GgufCheckpoint)
    info = checkpoint.info(name)
    data = checkpoint.read_packed(name, 0, info.rows).reshape(*info.shape[:-1], -1)
    if checkpoint.family.permutes_qk and info.experts == 1:
        data = data[row_order(checkpoint, name)]
    return torch.from_numpy(data)


def rope_divisors(checkpoint: Checkpoint) -> list[float] | None:
    """What a GGUF divides its rotary frequencies by (Llama 3.1's scaling), None if it does not."""
    name = "rope_freqs.weight"
    if not isinstance(checkpoint, GgufCheckpoint) or name not in checkpoint.tensors:
        return None
    return [float(value) for value in checkpoint.read(name)]
