"""The model in torch without its weights: transformers' own modules, filled tensor by tensor.

GGUF names and layouts come in, Hugging Face parameters come out: experts are stacked into transformers'
fused parameters, rows that llama.cpp permutes are put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, GgufCheckpoint, require_readable
from quantkit.encoders.base import check_finite
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

ReadTensor = Callable[[str], npt.NDArray[np.float32]]


def model_config(checkpoint: Checkpoint, cache: bool = False) -> Any:
    """transformers' configuration of a checkpoint's architecture. cache: keep keys and values from token to token."""
    import transformers

    require_readable(checkpoint)
    quiet()
    kind = checkpoint.config.get("model_type", checkpoint.family.model_type)
    return transformers.AutoConfig.for_model(kind, **_config_fields(checkpoint), use_cache=cache)


def empty_model(checkpoint: Checkpoint, cache: bool = False) -> Any:
    """transformers' model of a checkpoint's architecture on the meta device, in float32, for inference.

    cache: see ``model_config``, as generating wants it.
    """
    import torch
    import transformers

    config = model_config(checkpoint, cache)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are computed, not loaded
    if isinstance(checkpoint.opened, GgufCheckpoint) and "rope_freqs.weight" in checkpoint.tensors:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(checkpoint.read("rope_freqs.weight"))
    return model.eval().requires_grad_(False)


def _config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    fields = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "dtype", "torch_dtype", "use_cache")}
    fields["tie_word_embeddings"] = checkpoint.tied
    return fields


def quiet() -> None:
    """No progress bars and advice from transformers on our stderr."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tensor_names(checkpoint: Checkpoint, parameter: str) -> list[str]:
    """GGUF tensors from which a transformers parameter is made (two for fused gate and up)."""
    stem = parameter.rpartition(".")[0]
    for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        if parameter.endswith(f".mlp.experts.{fused}"):
            found = [checkpoint.family.to_gguf(f"{stem}.0.{part}.weight") for part in parts]
            return [target[0] for target in found if target]
    target = checkpoint.family.to_gguf(parameter)
    if target is None:
        raise CheckpointError(f"no tensor for the parameter {parameter}", hint="the architecture is not fully supported")
    return [target[0]]


def load_parameters(checkpoint: Checkpoint, module: Any, prefix: str = "", read: ReadTensor | None = None) -> None:
    """Fill the parameters of ``module`` (named with ``prefix`` in the whole model) from the checkpoint.

    read: replaces ``checkpoint.read``, for example to give decoded weights. Tied heads follow by themselves.
    """
    for name, _ in list(module.named_parameters()):
        full = f"{prefix}{name}"
        if full == "lm_head.weight" and checkpoint.tied:
            continue
        set_parameter(module, name, parameter_value(checkpoint, full, read or checkpoint.read))


def parameter_value(checkpoint: Checkpoint, parameter: str, read: ReadTensor) -> torch.Tensor:
    """The value of a transformers parameter, float32."""
    import torch

    names = tensor_names(checkpoint, parameter)
    arrays = [_restore_rows(checkpoint, name, _finite(name, read(name))) for name in names]
    value = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    if parameter.endswith("shared_expert_gate.weight"):
        value = value.reshape(1, -1)
    return torch.from_numpy(np.ascontiguousarray(value))


def _finite(name: str, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rows = value.reshape(-1, value.shape[-1])
    check_finite(rows, name)
    return value


def set_parameter(module: Any, name: str, value: torch.Tensor) -> None:
    """Replace a parameter (also one on the meta device) by ``value``, frozen."""
    import torch

    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def row_order(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.int64]:
    """Which row of a GGUF tensor (of each of its experts) every row of transformers' parameter is: int64 (rows,)."""
    info = checkpoint.info(name)
    rows = info.size if len(info.shape) == 1 else info.rows // info.experts
    numbers = np.arange(rows, dtype=np.float64)
    return _restore_rows(checkpoint, name, numbers if len(info.shape) == 1 else numbers[:, None]).reshape(-1).astype(np.int64)  # type: ignore[arg-type]


def _restore_rows(checkpoint: Checkpoint, name: str, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k where the family has it."""
    if not checkpoint.family.permutes_qk:
        return value
    stem = name.split(".")[-2]
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(stem)
    if heads is None:
        return value
    count = checkpoint.config.get(heads) or checkpoint.config["num_attention_heads"]
    flat = value.reshape(-1) if value.ndim == 1 or name.endswith("bias") else value
    rows = flat.shape[0]
    split = flat.reshape(count, rows // count // 2, 2, *flat.shape[1:])
    return split.swapaxes(1, 2).reshape(flat.shape)


def materialized_model(checkpoint: Checkpoint, read: ReadTensor | None = None) -> Any:
    """The whole model in memory, float32, ready to run."""
    model = empty_model(checkpoint)
    load_parameters(checkpoint, model, "", read)
    if checkpoint.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
