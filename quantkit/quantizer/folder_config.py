"""The ``quantization_config`` of a folder that quantkit writes, in the words of the library that loads it.

Fields: transformers 5.23 (utils/quantization_config.py) and vLLM (model_executor/layers/quantization), which reads
the same ones.
"""

from __future__ import annotations

import re
from typing import Any

from quantkit.checkpoint.quantization import COMPRESSORS, PACKED, SCHEMES
from quantkit.quantizer.folder_plan import HEAD, FolderPlan
from quantkit.versions import DISTRIBUTION, package_versions

Config = dict[str, Any]
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
# Activations rounded by the runtime, with scales of every token: what vLLM's INT8 kernels and its FP8 experts need.
TOKENS = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def quantization_config(plan: FolderPlan, dtype: str) -> Config:
    """What config.json says of a folder written by ``plan``. dtype: safetensors' name of the source's type."""
    name = plan.format.name
    if name in SCHEMES:
        return _compressed_tensors(plan)
    if name.startswith("GPTQ"):
        return _gptq(plan)
    if name.startswith("AWQ"):
        return {"quant_method": "awq", "bits": 4, "group_size": plan.format.group, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": plan.skipped}  # fmt: skip
    if name == "FP8_BLOCK":
        return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
                "modules_to_not_convert": plan.skipped}  # fmt: skip
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": plan.format.element,
            "bnb_4bit_use_double_quant": name.endswith("_DQ"), "bnb_4bit_compute_dtype": DTYPES.get(dtype, "bfloat16"),
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": plan.skipped}  # fmt: skip


def _compressed_tensors(plan: FolderPlan) -> Config:
    name = plan.format.name
    compressor = COMPRESSORS.get(name, PACKED)
    group: Config = {"targets": ["Linear"], "weights": SCHEMES[name], "format": compressor}
    if name == "INT8" or (name in ("FP8", "FP8_CHANNEL") and plan.experts):
        group["input_activations"] = TOKENS | {"type": SCHEMES[name]["type"]}
    ignore = [f"re:{re.escape(module)}\\..*" if module.endswith(".experts") else module for module in plan.skipped]
    out: Config = {"quant_method": "compressed-tensors", "format": compressor, "quantization_status": "compressed",
           "config_groups": {"group_0": group}, "ignore": ignore}  # fmt: skip
    if not plan.format.symmetric or "input_activations" in group:
        # transformers then computes with dense weights: with zero points it can do nothing else, and it would
        # imitate rounded activations in slow Python.
        out["dequantize"] = True
    return out


def _gptq(plan: FolderPlan) -> Config:
    out: Config = {"quant_method": "gptq", "bits": 4, "group_size": plan.format.group, "sym": plan.format.symmetric, "desc_act": False,
           "lm_head": False, "checkpoint_format": "gptq", "meta": {"quantizer": [_version()]}}  # fmt: skip
    layers = [module for module in plan.skipped if module != HEAD]
    if layers:
        # GPTQModel and vLLM leave out what a "-:" expression matches, optimum quantizes only what is listed.
        out["dynamic"] = {f"-:{pattern}": {} for pattern in dict.fromkeys(map(_any_layer, layers))}
        inside = dict.fromkeys(re.sub(r"^.*\.layers\.\d+\.", "", weight).rpartition(".")[0] for weight in plan.quantized)
        out["modules_in_block_to_quantize"] = [list(inside)]
    return out


def _any_layer(module: str) -> str:
    """A regular expression for a module in every layer."""
    end = r"\..*" if module.endswith(".experts") else "$"
    return "^" + re.sub(r"\\\.layers\\\.\d+\\\.", r"\\.layers\\.\\d+\\.", re.escape(module)) + end


def _version() -> str:
    return f"quantkit:{package_versions().get(DISTRIBUTION, '0')}"
