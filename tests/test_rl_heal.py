"""Healing: the divergence from the original falls, on text that training did not see."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.encoders import get_encoder
from quantkit.errors import AdapterError
from quantkit.formats import get_format
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run
from quantkit.rl.base import open_base
from quantkit.rl.heal import heal
from quantkit.rl.options import HealOptions, LoraOptions
from quantkit.rl.plugin_heal import begin_with_residual
from quantkit.rl.plugin_peft import LoraQuantLinear, lora_config, with_new_adapter

OPTIONS = HealOptions(steps=12, batch=4, together=8, window=64, learning_rate=2e-3, lora=LoraOptions(rank=16))


@pytest.fixture(scope="module")
def case(tiny_folder, tmp_path_factory):
    """(original, its file in Q4_0, text)."""
    folder, original = tmp_path_factory.mktemp("heal"), tiny_folder("qwen3")
    checkpoint = open_checkpoint(original)
    run(checkpoint, uniform_plan(checkpoint, "Q4_0", None), folder / "base.gguf")
    text = folder / "text.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:40_000])
    return original, folder / "base.gguf", text


def test_the_residual_helps_at_once_and_training_further(case, tmp_path):
    original, base, text = case
    found = heal(base, original, [text], tmp_path / "healed", OPTIONS)
    assert found.begun < 0.9 * found.base and found.healed < 0.9 * found.begun
    losses = [row["loss"] for row in found.outcome.log if "loss" in row]
    assert 0.5 * found.begun < losses[0] < 2 * found.begun  # nats/token, however batches are accumulated
    assert losses[-1] < losses[0] and (tmp_path / "healed" / "adapter_model.safetensors").exists()
    other = heal(base, original, [text], tmp_path / "other", HealOptions(**{**vars(OPTIONS), "residual": False}))
    assert (
        other.begun == pytest.approx(other.base, rel=1e-4)
        and found.base == pytest.approx(other.base)
        and other.healed < other.base
    )


def test_pairs_begin_as_the_best_of_their_rank(case):
    original, path, _ = case
    base, teacher = open_base(path), open_base(original)
    model = with_new_adapter(base.model, lora_config(base.model, 8))
    begin_with_residual(model, teacher.model)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraQuantLinear):
            lost = teacher.model.get_submodule(name).weight.detach() - module.base_layer.dequantized()
            made = (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach() * module.scaling["default"]
            least = torch.linalg.svdvals(lost)[8:].square().sum()
            assert float((lost - made).square().sum()) == pytest.approx(float(least), rel=1e-3)


def test_scales_learn_and_become_a_file_of_the_same_types(case, tmp_path):
    """The file that is written has the divergence that was told; a stopped run goes on to the same bytes."""
    original, base, text = case
    options = HealOptions(**{**vars(OPTIONS), "learn": "scales", "learning_rate": 1e-2, "save_every": 5, "lora": LoraOptions()})
    found = heal(base, original, [text], tmp_path / "healed", options)
    assert found.healed < 0.9 * found.base and found.begun == found.base
    before, after = open_checkpoint(base), open_checkpoint(found.file)
    assert {n: i.dtype for n, i in before.tensors.items()} == {n: i.dtype for n, i in after.tensors.items()}
    assert found.file.stat().st_size == pytest.approx(base.stat().st_size, rel=0.01)
    name = "blk.0.ffn_down.weight"
    rows = [source.read_packed(name, 0, source.info(name).rows).reshape(-1, 18) for source in (before, after)]
    assert np.array_equal(rows[0][:, 2:], rows[1][:, 2:]) and not np.array_equal(rows[0][:, :2], rows[1][:, :2])
    assert not np.array_equal(before.read("blk.0.attn_norm.weight"), after.read("blk.0.attn_norm.weight"))
    shutil.copytree(tmp_path / "healed", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-12")
    (tmp_path / "again" / "healed.gguf").unlink()
    again = heal(base, original, [text], tmp_path / "again", options, resume=True)
    assert again.file.read_bytes() == found.file.read_bytes() and again.healed == found.healed


@pytest.mark.parametrize("name, learn", [("llama", "scales"), ("qwen3_moe", "scales"), ("qwen3_moe", "adapter")])
def test_healing_under_rounded_activations(tiny_folder, tiny_gguf, case, tmp_path, name, learn):
    """Rounding the inputs costs something, and training takes some of it back; experts' inputs are rounded, too."""
    lora = LoraOptions(rank=8, experts=True) if learn == "adapter" else LoraOptions()
    options = HealOptions(**{**vars(OPTIONS), "learn": learn, "learning_rate": 1e-2 if learn == "scales" else 2e-3, "lora": lora})
    plain = heal(tiny_gguf(name), tiny_folder(name), [case[2]], tmp_path / "a", replace(options, steps=1))
    found = heal(tiny_gguf(name), tiny_folder(name), [case[2]], tmp_path / "b", replace(options, activations="FP4"))
    assert found.base > 1.05 * plain.base and found.healed < 0.95 * found.begun


def test_types_that_need_statistics_are_written_back(case, tmp_path):
    """A file with IQ2_XXS, which nothing encodes without statistics: its scales learn, and its bytes are written as they are."""
    original = tiny.build("llama", tmp_path / "model", hidden_size=256, intermediate_size=256)
    checkpoint, name = open_checkpoint(original), "blk.0.ffn_up.weight"
    plan = uniform_plan(checkpoint, "Q4_0", None)
    plan.tensors[name] = replace(plan.tensors[name], format="IQ2_XXS")
    rows = get_encoder("ggml").encode(checkpoint.read(name), np.ones(256, np.float32), get_format("IQ2_XXS"), name=name)
    run(checkpoint, plan, tmp_path / "base.gguf", given={name: rows})
    options = HealOptions(**{**vars(OPTIONS), "learn": "scales", "learning_rate": 1e-2, "steps": 2, "lora": LoraOptions()})
    found = heal(tmp_path / "base.gguf", original, [case[2]], tmp_path / "healed", options)
    healed = open_checkpoint(found.file)
    assert healed.info(name).dtype == "IQ2_XXS" and not np.array_equal(healed.read_packed(name, 0, 256), rows)


def test_the_command_says_what_it_did_and_refuses_what_does_not_fit(case, tmp_path):
    original, base, text = case
    common = ["rl", "qat", str(base), "--data", str(text), "--window", "64", "--batch", "4", "--together", "8", "--steps", "1"]
    said = CliRunner().invoke(main, [*common, "--teacher", str(original), "-o", str(tmp_path / "a"), "--json"])
    assert said.exit_code == 0 and json.loads(said.output)["healed"] > 0 and json.loads(said.output)["file"] is None
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(AdapterError, match="0 windows of 64 tokens"):
        heal(base, original, [tmp_path / "short.txt"], tmp_path / "b", OPTIONS)
    with pytest.raises(AdapterError, match="cannot be read"):
        heal(base, original, [tmp_path / "none.txt"], tmp_path / "b", OPTIONS)
    with pytest.raises(AdapterError, match="is no GGUF"):
        heal(original, original, [text], tmp_path / "d", replace(OPTIONS, learn="scales", lora=LoraOptions()))
    with pytest.raises(AdapterError, match="without an adapter"):
        heal(base, original, [text], tmp_path / "d", replace(OPTIONS, learn="scales", lora=LoraOptions(rank=4)))
    with pytest.raises(AdapterError, match="lower --batch"):
        heal(base, original, [text], tmp_path / "d", replace(OPTIONS, batch=1024, together=1024))
    with pytest.raises(AdapterError, match="no activations 'INT3'"):
        heal(base, original, [text], tmp_path / "d", replace(OPTIONS, activations="INT3"))
    other = tiny.build("llama", tmp_path / "other", vocab_size=4160)
    with pytest.raises(AdapterError, match="another vocabulary"):
        heal(base, other, [text], tmp_path / "c", OPTIONS)
