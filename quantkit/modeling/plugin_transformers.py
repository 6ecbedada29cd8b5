"""quantkit as a quantization method of transformers. Imported only inside functions: it needs transformers.

With ``QuantkitConfig`` imported, ``AutoModelForCausalLM.from_pretrained(PATH, quantization_config=QuantkitConfig())``
loads a quantized GGUF with its weights packed, a folder that ``save_pretrained`` wrote of such a model (there the
argument can be left out), and with ``QuantkitConfig(format="Q4_K")`` a model that is not quantized yet.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.integrations import peft as peft_integration
from transformers.models.auto import auto_factory
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.encoders import get_encoder
from quantkit.encoders.ggml import encoding_on
from quantkit.errors import FormatError, PlanError
from quantkit.formats import Format, formats, get_format
from quantkit.formats.tensors import TensorFormat, get_tensor_format, tensor_formats
from quantkit.formats.tensors.blocks import to_blocks
from quantkit.modeling.modules import Packed, QuantExperts, QuantLinear
from quantkit.modeling.packed import (
    EXPERTS,
    fill,
    formats_of,
    is_experts,
    join_gates,
    packed_formats,
    prepare,
    put,
    rope_divisors,
)
from quantkit.modeling.skeleton import model_config

METHOD = "quantkit"
SUFFIX = ".gguf"


@register_quantization_config(METHOD)
class QuantkitConfig(QuantizationConfigMixin):
    """format: quantize a model to it while loading: a GGUF format, rounded by ggml's method without activation statistics, or
    one of safetensors files (NF4, W4A16, AWQ_INT4_G128, FP8 …), rounded as its library does.

    modules_to_not_convert: parts of names of modules to leave alone then (by default the head). formats: of a model that
    is quantized, parameter → format. rope_divisors: what its rotary frequencies are divided by, where the file says so.
    """

    def __init__(
        self, format: str | None = None, modules_to_not_convert: list[str] | None = None, formats: dict[str, str] | None = None,
        rope_divisors: list[float] | None = None, **ignored: Any,
    ) -> None:  # fmt: skip
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.modules_to_not_convert = modules_to_not_convert
        self.formats = formats
        self.rope_divisors = rope_divisors
        if format is not None:
            _target(format)


@register_quantizer(METHOD)
class QuantkitQuantizer(HfQuantizer):
    """Puts packed layers into transformers' model."""

    quantization_config: QuantkitConfig
    requires_calibration = False
    _file: Checkpoint | None = None
    _folder: Any = None

    def update_dtype(self, dtype: Any) -> Any:
        return dtype if dtype is not None else torch.float32

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        config = self.quantization_config
        if checkpoint_files and checkpoint_files[0].endswith(SUFFIX):
            if config.format is not None:
                raise PlanError(f"{checkpoint_files[0]} is a GGUF, whose tensors stay as they are", hint="leave out format=")
            self._file = open_checkpoint(checkpoint_files[0])
            config.formats, config.rope_divisors = formats_of(self._file, model), rope_divisors(self._file)
            self._folder = tempfile.TemporaryDirectory(prefix="quantkit-")  # transformers reads no weights, fill does
            checkpoint_files[:] = [str(Path(self._folder.name, "none.safetensors"))]
            save_file({}, checkpoint_files[0], {"format": "pt"})
            model._keys_to_ignore_on_load_missing = [".*"]
            model.adjust_generation_fn = lambda *args, **kwargs: None  # would look for generation_config.json on the Hub
        elif not self.pre_quantized and config.format is None:
            raise PlanError(
                "the model is not quantized yet, and QuantkitConfig() names no format",
                hint="give QuantkitConfig(format='Q4_K'), or a file that quantkit quantize wrote",
            )
        prepare(model, config.formats or {})
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self._file is not None:
            fill(self._file, model, model.dtype)
            del model._keys_to_ignore_on_load_missing, model.adjust_generation_fn
            self._folder.cleanup()
            self._file = self._folder = None
        elif not self.pre_quantized and config.format is not None:
            _quantize(model, config.format, tuple(config.modules_to_not_convert or ("lm_head",)))
            if not (found := packed_formats(model)):
                raise PlanError(f"no layer of the model fits {config.format}", hint="choose another format, such as Q8_0")
            config.formats, config.format = found, None
        self.pre_quantized = True
        if config.rope_divisors is not None:
            rotary = model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.tensor(config.rope_divisors, device=rotary.inv_freq.device)
        for module in model.modules():
            if isinstance(module, Packed):
                module.lay_out()
        join_gates(model)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model: Any, formats: dict[str, str], divisors: list[float] | None) -> None:
    """Let transformers know a model that was not loaded by it: ``save_pretrained`` and its Trainer ask for this."""
    config = QuantkitConfig(formats=formats, rope_divisors=divisors)
    model.config.quantization_config = config
    model.hf_quantizer = QuantkitQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD


def _quantize(model: Any, fmt: str, skipped: tuple[str, ...]) -> None:
    """Encode the linear maps and experts of a loaded model, one after the other."""
    target = _target(fmt)
    for name, module in list(model.named_modules()):
        if any(part in name for part in skipped):
            continue
        if isinstance(module, nn.Linear) and module.out_features > 1:
            if (made := _encoded(module.weight, target, name)) is not None:
                put(model, name, QuantLinear(made[1], made[0], module.bias))
        elif is_experts(module):
            gate, up = module.gate_up_proj.chunk(2, dim=1)
            parts = zip(EXPERTS, (gate, up, module.down_proj), strict=True)
            found = {part: _encoded(value, target, f"{name}.{part}") for part, value in parts}
            packed = {part: made for part, made in found.items() if made is not None}
            if len(packed) == len(found):
                tensors, names = ({part: made[i] for part, made in packed.items()} for i in (1, 0))
                put(model, name, QuantExperts(tensors, names, getattr(model.config, "hidden_act", "silu")))  # type: ignore[arg-type]


def _target(name: str) -> type[Format] | type[TensorFormat]:
    """The format to quantize to; GGUF's where both kinds have one of that name. Raises FormatError."""
    if name.upper() in {fmt.name for fmt in tensor_formats()} - {fmt.name for fmt in formats()}:
        return get_tensor_format(name)
    fmt = get_format(name)
    if fmt.codes is None:
        raise FormatError(f"{name} does not quantize", hint="choose one of `quantkit formats`, such as Q4_K")
    return fmt


def _encoded(weight: torch.Tensor, target: type[Format] | type[TensorFormat], name: str) -> tuple[str, torch.Tensor] | None:
    """The format of packed bytes and the bytes on the weight's device, uint8 (..., rows, bytes); None if it does not fit."""
    values = weight.detach().float().cpu().numpy()
    if issubclass(target, Format):
        if not target.fits(values.shape[-1]):
            return None
        with encoding_on(str(weight.device)):
            packed = get_encoder("ggml").encode(values.reshape(-1, values.shape[-1]), None, target, name=name)
        return target.name, torch.from_numpy(packed).reshape(*weight.shape[:-1], -1).to(weight.device)
    if not target.fits(values.shape[-2:]):
        return None
    matrices = values.reshape(-1, *values.shape[-2:])
    made = [to_blocks(target.parts(target.encode(matrix), matrix.shape)) for matrix in matrices]
    blocks = [block for block in made if block is not None]
    if len(blocks) < len(made) or len({fmt.name for fmt, _ in blocks}) != 1:
        return None
    data = np.stack([data for _, data in blocks]).reshape(*weight.shape[:-1], -1)
    return blocks[0][0].name, torch.from_numpy(data).to(weight.device)


# transformers reads the configuration in a .gguf only for a method of its own and has no hook for others: a path that
# ends in .gguf, which it could not read at all, is answered here; everything else goes on to transformers.
_from_pretrained = transformers.AutoConfig.from_pretrained.__func__  # type: ignore[attr-defined]
HUB = {
    "return_unused_kwargs", "code_revision", "_commit_hash", "cache_dir", "force_download", "local_files_only", "proxies",
    "revision", "subfolder", "token", "trust_remote_code", "_from_auto", "_from_pipeline",
}  # fmt: skip


def _config(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    path = Path(pretrained_model_name_or_path)
    if path.suffix != SUFFIX or kwargs.get("gguf_file") or not path.is_file():
        return _from_pretrained(cls, pretrained_model_name_or_path, **kwargs)
    config = model_config(open_checkpoint(path), cache=True)
    left = {name: value for name, value in kwargs.items() if name not in HUB}
    return (config, left) if kwargs.get("return_unused_kwargs") else config


transformers.AutoConfig.from_pretrained = classmethod(_config)  # type: ignore[method-assign, assignment]

# With PEFT installed transformers also looks for an adapter at the path, which for a file means on the Hub.
_find_adapter = auto_factory.find_adapter_config_file


def _adapter(path: Any, *args: Any, **kwargs: Any) -> Any:
    return None if Path(str(path)).suffix == SUFFIX and Path(str(path)).is_file() else _find_adapter(path, *args, **kwargs)


for _module in (auto_factory, peft_integration):
    _module.find_adapter_config_file = _adapter  # type: ignore[attr-defined]
