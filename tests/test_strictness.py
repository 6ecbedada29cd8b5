"""What a checkpoint may not be: shapes, experts, biases and configs that llama.cpp would not load or not follow."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.checkpoint.gguf_writer import TensorSpec, write_gguf
from quantkit.encoders import get_encoder
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats import get_format
from quantkit.modeling.text import TextEncoder
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run


def copy(tiny_folder, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(name), folder)
    return folder


def edit(folder, function):
    weights = load_file(folder / "model.safetensors")
    function(weights)
    save_file(weights, folder / "model.safetensors")


def rename_expert(weights):
    for part in ("gate_proj", "up_proj", "down_proj"):
        weights[f"model.layers.0.mlp.experts.7.{part}.weight"] = weights.pop(f"model.layers.0.mlp.experts.3.{part}.weight")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2_moe", rename_expert, r"experts \[0, 1, 2, 7\] found"),
        (
            "qwen3",
            lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": w["model.norm.weight"].clone()}),
            "attn_output.bias",
        ),
        ("llama", lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:7].clone()}), r"output_norm.weight is \[7\]"),
        (
            "llama",
            lambda w: w.update({"model.layers.0.mlp.gate_proj.weight": w["model.embed_tokens.weight"][:64].clone()}),
            "ffn_gate",
        ),
        (
            "qwen3_moe",
            lambda w: w.update({"model.layers.0.mlp.gate.weight": w["model.embed_tokens.weight"][:9].clone()}),
            "ffn_gate_inp",
        ),
    ],
    ids=["expert numbers", "bias", "norm", "ffn", "router"],
)
def test_weights_that_contradict_the_config(name, change, words, tiny_folder, tmp_path):
    folder = copy(tiny_folder, tmp_path, name)
    edit(folder, change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 1}, "beyond the 1 layers"),
        ({"num_hidden_layers": 0}, "positive whole number"),
        ({"num_attention_heads": "4"}, "positive whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"architectures": {"a": 1}}, "unknown architecture"),
    ],
)
def test_configs_that_cannot_be_followed(change, words, tiny_folder, tmp_path):
    folder = copy(tiny_folder, tmp_path, "llama")
    tiny.rewrite_config(folder, **change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_lfs_pointers_in_place_of_small_files(name, tiny_folder, tmp_path):
    folder = copy(tiny_folder, tmp_path, "llama")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(folder).metadata()


def test_truncation_in_tokenizer_json_is_not_obeyed(tiny_folder, tmp_path):
    import json

    folder = copy(tiny_folder, tmp_path, "llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(TextEncoder(open_checkpoint(folder)).encode("word " * 500)) > 400


def test_a_gguf_without_what_is_needed(tmp_path):
    def model(**changes):
        metadata = dict(open_checkpoint(tiny.DENSE).metadata())
        metadata.update(changes)
        metadata = {k: v for k, v in metadata.items() if v is not None}
        spec = TensorSpec("token_embd.weight", (4096, 256), get_format("F32"))
        with write_gguf(tmp_path / "x.gguf", metadata, [spec]) as writer:
            writer.write(spec.name, np.zeros(spec.shape, np.float32))
        return open_checkpoint(tmp_path / "x.gguf")

    for key, words in (
        ("qwen3.embedding_length", "hidden_size"), ("qwen3.block_count", "num_hidden_layers"),
        ("tokenizer.ggml.tokens", "tokenizer.ggml.tokens"), ("tokenizer.ggml.merges", "merges"), ("general.architecture", "general.architecture"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            model(**{key: None})
    with pytest.raises(CheckpointError, match="output_norm"):
        model()


def test_another_alignment_is_not_copied(tmp_path):
    checkpoint = open_checkpoint(tiny.DENSE)
    run(checkpoint, uniform_plan(checkpoint, "BF16", None), tmp_path / "a.gguf")
    source = open_checkpoint(tmp_path / "a.gguf")
    source._metadata["general.alignment"] = gv.u32(64)
    run(source, uniform_plan(source, "Q8_0", None), tmp_path / "b.gguf")
    assert GgufFile(tmp_path / "b.gguf").alignment == 32


@pytest.mark.parametrize(("name", "size"), [("F16", 1e6), ("Q8_0", 1e30), ("Q4_K", 1e12), ("Q5_1", 1e9)])
def test_weights_too_large_for_half_precision_are_refused(name, size):
    x = np.full((2, 256), size, np.float32) * np.linspace(-1, 1, 256, dtype=np.float32)
    with pytest.raises(FormatError, match=r"blk\.0\.w has weights up to .* too large"):
        get_encoder("ggml").encode(x, None, get_format(name), name="blk.0.w")


def test_an_edited_model_is_not_mistaken_for_the_one_before(tiny_folder, tmp_path):
    folder = copy(tiny_folder, tmp_path, "llama")
    before = open_checkpoint(folder)
    stamp, identity = before.stamp, before.identity
    edit(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    after = open_checkpoint(folder)
    assert after.stamp != stamp and after.identity != identity
    tiny.rewrite_config(folder, rms_norm_eps=1e-3)
    assert open_checkpoint(folder).identity != after.identity
