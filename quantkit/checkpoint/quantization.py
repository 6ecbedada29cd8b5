"""Which formats a folder's ``quantization_config`` stands for, or why quantkit does not read it.

Fields: transformers 5.23, utils/quantization_config.py; compressed-tensors 0.20, quantization/quant_args.py.
"""

from __future__ import annotations

from typing import Any

from quantkit.errors import CheckpointError
from quantkit.formats.tensors import TensorFormat, get_tensor_format, tensor_formats

Config = dict[str, Any]
Formats = list[type[TensorFormat]]

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
# Format → what compressed-tensors calls ``weights``.
SCHEMES: dict[str, Config] = {
    "W4A16": INT4, "W4A16_G32": INT4 | {"group_size": 32},
    "W4A16_ASYM": INT4 | {"symmetric": False}, "W4A16_ASYM_G32": INT4 | {"symmetric": False, "group_size": 32},
    "INT8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "FP8": FLOAT8, "FP8_CHANNEL": FLOAT8 | {"strategy": "channel"},
    "MXFP4": MX | {"num_bits": 4}, "MXFP8": MX | {"num_bits": 8},
    "NVFP4": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
              "scale_dtype": "torch.float8_e4m3fn"},
}  # fmt: skip
# Format → its compressor, where it is not pack-quantized.
COMPRESSORS = {
    "INT8": "int-quantized", "FP8": "float-quantized", "FP8_CHANNEL": "float-quantized", "MXFP4": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized", "NVFP4": "nvfp4-pack-quantized",
}  # fmt: skip
PACKED = "pack-quantized"
MATTERS = ("num_bits", "type", "symmetric", "strategy", "group_size")  # of ``weights``; the rest does not change their meaning

HINT = (
    "quantkit reads bitsandbytes in 4 bits, GPTQ and AWQ in 4 bits, compressed-tensors and FP8 in blocks of 128; "
    "give the model that was not quantized"
)


def read_formats(config: Config, source: str) -> Formats:
    """Formats that the quantized weights of a folder may have; their tensors tell which one each has.

    config: ``quantization_config`` of config.json. Raises CheckpointError that names the method or the parameter
    that quantkit does not know.
    """
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # as old versions of transformers wrote it
    readers = {
        "bitsandbytes": _bitsandbytes, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8,
    }  # fmt: skip
    if method == "quantkit":
        raise CheckpointError(
            f"{source} was written by transformers' save_pretrained from packed weights",
            hint="load it with transformers and quantkit.QuantkitConfig(), or give the GGUF that it came from",
        )
    if method not in readers:
        raise CheckpointError(f"{source} was quantized by the method {method!r}", hint=HINT)
    return readers[method](config, source)


def _require(config: Config, source: str, wanted: dict[str, tuple[Any, ...]]) -> None:
    """Raise CheckpointError for the first field whose value is none of those wanted."""
    for name, values in wanted.items():
        value = config.get(name, values[0])
        value = value.lower() if isinstance(value, str) else value
        if value not in values:
            known = " or ".join(str(v) for v in values if v is not None)
            raise CheckpointError(f"{source}: quantization_config has {name}: {value!r}, quantkit reads {known}", hint=HINT)


def _bitsandbytes(config: Config, source: str) -> Formats:
    _require(config, source, {"load_in_8bit": (False, None), "load_in_4bit": (True,), "bnb_4bit_quant_storage": ("uint8", None)})
    _require(config, source, {"bnb_4bit_quant_type": ("fp4", "nf4")})  # fp4 is transformers' default
    name = str(config.get("bnb_4bit_quant_type", "fp4")).upper()
    return [get_tensor_format(f"{name}_DQ"), get_tensor_format(name)]


def _gptq(config: Config, source: str) -> Formats:
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    _require({**config, "checkpoint_format": version}, source, {"checkpoint_format": ("gptq",)})
    _require(config, source, {"bits": (4,), "group_size": (128, 32)})
    overrides = {name: value for name, value in (config.get("dynamic") or {}).items() if not str(name).startswith("-:")}
    if overrides:
        raise CheckpointError(f"{source}: quantization_config gives {next(iter(overrides))!r} a format of its own", hint=HINT)
    middle = "" if config.get("sym", True) else "_ASYM"
    return [get_tensor_format(f"GPTQ_INT4{middle}_G{config.get('group_size', 128)}")]


def _awq(config: Config, source: str) -> Formats:
    if "bits" not in config and "w_bit" in config:  # AutoAWQ's own names
        config = {**config, "bits": config["w_bit"], "group_size": config.get("q_group_size", 128)}
    version = config.get("version") or config.get("format") or "gemm"
    _require({**config, "version": version}, source, {"version": ("gemm",)})
    _require(config, source, {"bits": (4,), "group_size": (128, 32), "zero_point": (True,)})
    return [get_tensor_format(f"AWQ_INT4_G{config.get('group_size', 128)}")]


def _fp8(config: Config, source: str) -> Formats:
    block = config.get("weight_block_size")
    _require({**config, "weight_block_size": tuple(block or ())}, source, {"weight_block_size": ((128, 128),)})
    _require(config, source, {"scale_fmt": ("float", None), "expert_dtype": ("fp8", None), "fmt": ("e4m3", None)})
    return [get_tensor_format("FP8_BLOCK")]


def _compressed_tensors(config: Config, source: str) -> Formats:
    for name in ("transform_config", "sparsity_config"):
        value = config.get(name)
        if value and value != {"format": "dense"} and value.get("format") != "dense":
            raise CheckpointError(f"{source}: quantization_config has a {name}", hint=HINT)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{source}: quantization_config has no config_groups", hint=HINT)
    found = [_scheme(group, config.get("format"), source) for group in groups.values()]
    return [fmt for fmt in tensor_formats() if fmt in found]


def _scheme(group: Any, overall: str | None, source: str) -> type[TensorFormat]:
    """The format of one group of a compressed-tensors configuration."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{source}: a group of quantization_config does not say how weights are stored", hint=HINT)
    compressor = group.get("format") or overall
    strategy = "group" if weights.get("group_size") else "tensor"
    said = {"type": "int", "symmetric": True, "strategy": strategy, **weights}
    for name, scheme in SCHEMES.items():
        same = all(said.get(key) == scheme.get(key) for key in MATTERS)
        if same and compressor in (COMPRESSORS.get(name, PACKED), None) and not weights.get("dynamic"):
            return get_tensor_format(name)
    words = ", ".join(f"{key}: {said.get(key)}" for key in MATTERS)
    raise CheckpointError(f"{source}: quantization_config has weights of {words} in {compressor}", hint=HINT)
