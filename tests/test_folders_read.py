"""Quantized folders that others wrote: decoded as their library decodes them, or refused by the name of what is unknown."""

from __future__ import annotations

import json
import shutil

import folder_tools as tools
import pytest
import tiny
import torch
from tensor_tools import library, same

from quantkit.checkpoint import open_checkpoint
from quantkit.errors import CheckpointError
from quantkit.formats.tensors import get_tensor_format

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tools.build("llama", tmp_path_factory.mktemp("read") / "dense")


@pytest.fixture
def written(dense, tmp_path):
    """Writes a format and gives the folder, whose tensors ``change`` may edit."""

    def write(name: str, change=None, **config: object):
        from safetensors.torch import load_file, save_file

        folder = tmp_path / name
        tools.write(dense, name, folder)
        if change is not None:
            state = load_file(folder / "model.safetensors")
            change(state)
            save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        tiny.rewrite_config(folder, quantization_config={**found, **config})
        return folder

    return write


@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("fp4", False)])
def test_what_transformers_and_bitsandbytes_write(quant_type, nested, dense, tmp_path):
    import transformers

    bnb = library("bitsandbytes.functional")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "bnb")
    checkpoint = open_checkpoint(tmp_path / "bnb")
    assert checkpoint.info("blk.0.attn_q.weight").dtype == quant_type.upper() + ("_DQ" if nested else "")
    assert checkpoint.info("output.weight").dtype == "BF16"
    packed = model.get_parameter(f"{DOWN}.weight")
    packed.quant_state.dtype = torch.float32
    assert same(checkpoint.read("blk.0.ffn_down.weight") + 0, bnb.dequantize_4bit(packed.data, packed.quant_state) + 0)


@pytest.mark.parametrize("name", ["W4A16_ASYM", "FP8", "FP8_CHANNEL", "INT8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_in_other_types_equal_compressed_tensors(name, dtype, written):
    base = library("compressed_tensors.compressors.base").BaseCompressor
    quantization = library("compressed_tensors.quantization")
    kept = {}

    def change(state):
        for key in [key for key in state if key.endswith("_scale")]:
            state[key] = (state[key].float() * 1.001).to(dtype)
        kept.update({key.removeprefix(f"{DOWN}."): value for key, value in state.items() if key.startswith(DOWN)})
        kept["weight_scale"] = kept["weight_scale"].float()  # it computes in the type of the scale
        if name == "FP8":
            state[f"{DOWN}.weight_scale"] = state[f"{DOWN}.weight_scale"].reshape(())  # as old versions stored it

    folder = written(name, change)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**group["weights"]))
    theirs = base.get_value_from_registry(group["format"]).decompress(kept, scheme)["weight"]
    assert theirs.dtype == torch.float32 and same(open_checkpoint(folder).read("blk.0.ffn_down.weight"), theirs)


def test_block_scales_in_bfloat16_as_qwen_publishes_them(written):
    def change(state):
        for key in [key for key in state if key.endswith("scale_inv")]:
            state[key] = state[key].bfloat16()
        kept.update(state)

    kept: dict[str, torch.Tensor] = {}
    folder = written("FP8_BLOCK", change)
    scale = kept[f"{DOWN}.weight_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert same(open_checkpoint(folder).read("blk.0.ffn_down.weight"), kept[f"{DOWN}.weight"].float() * scale)


def test_gptq_in_another_order_and_with_biases_of_zeros(tmp_path):
    from safetensors.torch import load_file, save_file

    source = tools.build("qwen3", tmp_path / "source", head_dim=32)
    tools.write(source, "GPTQ_INT4_G32", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    state[f"{DOWN}.g_idx"] = state[f"{DOWN}.g_idx"][order]
    state[f"{DOWN}.bias"] = torch.zeros(128)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(state, tmp_path / "out" / "model.safetensors")
    fmt, checkpoint = get_tensor_format("GPTQ_INT4_G32"), open_checkpoint(tmp_path / "out")
    tensors = {key.removeprefix(f"{DOWN}."): value.numpy() for key, value in state.items() if key.startswith(DOWN)}
    assert same(checkpoint.read("blk.0.ffn_down.weight"), fmt.decode(tensors, (128, 256)))
    assert same(checkpoint.read_rows("blk.0.ffn_down.weight", 3, 9), fmt.decode(tensors, (128, 256))[3:9])
    assert "blk.0.ffn_down.bias" not in checkpoint.tensors
    state[f"{DOWN}.bias"][5] = 1
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor blk\.0\.ffn_down\.bias"):
        open_checkpoint(tmp_path / "out")


UNKNOWN = [
    ("NF4", {"quant_method": "hqq"}, "method 'hqq'"),
    ("NF4", {"load_in_8bit": True}, "load_in_8bit: True"),
    ("NF4", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type: 'int4'"),
    ("NF4", {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage: 'bfloat16'"),
    ("GPTQ_INT4_G32", {"bits": 8}, "bits: 8, quantkit reads 4"),
    ("GPTQ_INT4_G32", {"group_size": 64}, "group_size: 64, quantkit reads 128 or 32"),
    ("GPTQ_INT4_G32", {"checkpoint_format": "gptq_v2"}, "checkpoint_format: 'gptq_v2'"),
    ("GPTQ_INT4_G32", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "format of its own"),
    ("AWQ_INT4_G32", {"version": "gemv"}, "version: 'gemv'"),
    ("AWQ_INT4_G32", {"zero_point": False}, "zero_point: False"),
    ("FP8_BLOCK", {"weight_block_size": None}, "weight_block_size"),
    ("FP8_BLOCK", {"scale_fmt": "ue8m0"}, "scale_fmt: 'ue8m0'"),
    ("W4A16", {"config_groups": {}}, "no config_groups"),
    ("W4A16", {"config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}}, "num_bits: 3"),
    ("W4A16", {"config_groups": {"g": {"weights": None}}}, "does not say how weights are stored"),
    ("W4A16", {"transform_config": {"rotations": 1}}, "transform_config"),
]


@pytest.mark.parametrize("name, config, words", UNKNOWN, ids=lambda v: v if isinstance(v, str) else "")
def test_unknown_methods_and_parameters_are_refused_by_name(name, config, words, written):
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(written(name, **config))
    assert "give the model that was not quantized" in str(error.value)


@pytest.mark.parametrize("name", ["NF4_DQ", "GPTQ_INT4_G32", "AWQ_INT4_G32", "W4A16", "FP8_BLOCK", "NVFP4"])
def test_missing_extra_and_misshapen_tensors_are_refused_by_name(name, written, tmp_path):
    suffix = max(get_tensor_format(name).layout((128, 128)), key=lambda s: ("scale" in s or "absmax" in s, s))
    with pytest.raises(CheckpointError, match=f"{QUERY}.*needs the tensor '{suffix}'"):
        open_checkpoint(written(name, lambda state: state.pop(f"{QUERY}.{suffix}")))
    shutil.rmtree(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{QUERY}: {suffix} is "):
        open_checkpoint(written(name, lambda state: state.update({f"{QUERY}.{suffix}": torch.ones(3, 3)})))
    shutil.rmtree(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{QUERY}: the tensor 'input_scale' is not part of {name}"):
        open_checkpoint(written(name, lambda state: state.update({f"{QUERY}.input_scale": torch.ones(1)})))


def test_missing_weights_and_unknown_modules_are_refused(written, tmp_path):
    def without(state):
        for key in [key for key in state if key.startswith(DOWN)]:
            del state[key]

    with pytest.raises(CheckpointError, match=r"no tensor blk\.0\.ffn_down\.weight"):
        open_checkpoint(written("W4A16", without))
    shutil.rmtree(tmp_path / "W4A16")
    with pytest.raises(CheckpointError, match="k_scale"):
        open_checkpoint(written("W4A16", lambda state: state.update({"model.layers.0.self_attn.k_scale": torch.ones(1)})))


def test_a_damaged_state_is_named_when_it_is_read(written):
    def change(state):
        key = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
        state[key] = torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)

    checkpoint = open_checkpoint(written("NF4", change))
    with pytest.raises(CheckpointError, match=f"{DOWN}.weight: NF4's tensor .*quant_state.* is damaged"):
        checkpoint.read("blk.0.ffn_down.weight")
    assert checkpoint.read("blk.0.attn_q.weight").shape == (128, 128)
