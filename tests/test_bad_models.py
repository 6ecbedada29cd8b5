"""Damaged and foreign models: one clear error, nothing guessed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from quantkit.checkpoint import open_checkpoint
from quantkit.errors import CheckpointError


@pytest.fixture
def model(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    return folder


def change_weights(folder, function):
    weights = load_file(folder / "model.safetensors")
    function(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_path(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")


def test_missing_tensor(model):
    change_weights(model, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
        open_checkpoint(model)


def test_unknown_tensor_is_not_dropped(model):
    change_weights(model, lambda w: w.update({"model.layers.0.mlp.extra.weight": np.zeros((2, 2), np.float32)}))
    with pytest.raises(CheckpointError, match="mlp.extra.weight"):
        open_checkpoint(model)


def test_shape_against_config(model):
    tiny.rewrite_config(model, vocab_size=4000)
    with pytest.raises(CheckpointError, match=r"(token_embd|output)\.weight is \[4096, 64\], config.json asks for \[4000, 64\]"):
        open_checkpoint(model)


def test_unknown_architecture(model):
    tiny.rewrite_config(model, architectures=["GiraffeForCausalLM"])
    with pytest.raises(CheckpointError, match="GiraffeForCausalLM.*LlamaForCausalLM"):
        open_checkpoint(model)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_config_that_is_no_config(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(model)


def test_config_without_a_number(model):
    tiny.rewrite_config(model, num_attention_heads=None)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        open_checkpoint(model)


def test_pickles_are_refused(model, tmp_path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="run code"):
        open_checkpoint(model)
    with pytest.raises(CheckpointError, match="run code"):
        open_checkpoint(model / "pytorch_model.bin")


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no \\*.safetensors"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "evil.bin"])
def test_index_cannot_leave_the_folder(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(model)


def test_missing_shard(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"shard model-2\.safetensors is missing"):
        open_checkpoint(model)


def test_shards_are_read_together(model):
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({n: weights[n] for n in some}, model / file)
    index = {"weight_map": {n: file for file, some in parts.items() for n in some}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = open_checkpoint(model)
    assert np.array_equal(whole.read("blk.1.ffn_down.weight"), weights["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(name, change, words, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(name), folder)
    tiny.rewrite_config(folder, **change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder).metadata()


def test_unknown_tensor_name_suggests_near_ones(model):
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight"):
        open_checkpoint(model).info("blk.0.attn_qq.weight")
