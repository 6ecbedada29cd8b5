"""Healing: the divergence from the original falls, on text that training did not see."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.errors import AdapterError
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


def test_the_command_says_what_it_did_and_refuses_what_does_not_fit(case, tmp_path):
    original, base, text = case
    common = ["rl", "qat", str(base), "--data", str(text), "--window", "64", "--batch", "4", "--together", "8", "--steps", "1"]
    said = CliRunner().invoke(main, [*common, "--teacher", str(original), "-o", str(tmp_path / "a"), "--json"])
    assert said.exit_code == 0 and "healed" in json.loads(said.output)["advice"][0]
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(AdapterError, match="0 windows of 64 tokens"):
        heal(base, original, [tmp_path / "short.txt"], tmp_path / "b", OPTIONS)
    with pytest.raises(AdapterError, match="cannot be read"):
        heal(base, original, [tmp_path / "none.txt"], tmp_path / "b", OPTIONS)
    other = tiny.build("llama", tmp_path / "other", vocab_size=4160)
    with pytest.raises(AdapterError, match="another vocabulary"):
        heal(base, other, [text], tmp_path / "c", OPTIONS)
