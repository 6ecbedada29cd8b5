"""Adapters on packed bases: what is trained, what never changes, and a run that was stopped going on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantkit import api
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import AdapterError, OutputError, RewardError
from quantkit.modeling.modules import QuantLinear
from quantkit.rl import base as bases
from quantkit.rl import train
from quantkit.rl.options import DpoOptions, GrpoOptions, LoraOptions, SftOptions

ROWS = [{"prompt": f"Say {n}.", "completion": f"{n} and {n}"} for n in range(8)]
SFT = SftOptions(steps=4, batch=4, together=8, learning_rate=1e-2, save_every=2, lora=LoraOptions(rank=4))
GRPO = GrpoOptions(
    steps=4, generations=4, together=16, batch=8, completion=6, learning_rate=1e-2, save_every=2, beta=0.01, lora=LoraOptions(rank=4)
)  # fmt: skip


def letters(prompts, completions, **columns):
    """Rewards the letter a."""
    return [float(text_of(completion).count("a")) for completion in completions]


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name, experts", [("llama", False), ("qwen3_moe", True)])
def test_priming_lowers_the_loss_and_changes_no_byte_of_the_base(tiny_gguf, tmp_path, name, experts):
    options = SftOptions(**{**vars(SFT), "steps": 8, "lora": LoraOptions(rank=4, experts=experts)})
    outcome = train.sft(tiny_gguf(name), ROWS, tmp_path / "primed", options)
    losses = [row["loss"] for row in outcome.log if "loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    base = bases.open_base(tiny_gguf(name))
    assert json.loads((tmp_path / "primed" / bases.BINDING).read_text())["digest"] == base.digest
    found = weights(tmp_path / "primed")
    assert any("experts.lora_B_down_proj" in key for key in found) == experts
    assert all(float(value.abs().max()) > 0 for key, value in found.items() if "lora_B" in key and "experts" not in key)
    assert any(isinstance(module, QuantLinear) for module in base.model.modules())


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
)


def test_conversations_count_only_what_the_model_says(tiny_gguf, tmp_path):
    """The same loss as with prompt and completion; a template that marks nothing, or is broken, is refused by name."""
    template = tmp_path / "marked.jinja"
    template.write_text(MARKED)
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]} for r in ROWS
    ]
    options = SftOptions(**{**vars(SFT), "steps": 1})
    spoken = train.sft(tiny_gguf("llama"), rows, tmp_path / "spoken", options, template=template, system="Be brief.")
    assert 0 < spoken.log[0]["loss"] < 20 and spoken.log[0]["num_tokens"] > 8 * 4
    plain = tmp_path / "plain.jinja"
    plain.write_text(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    with pytest.raises(RewardError, match="does not mark"):
        train.sft(tiny_gguf("llama"), rows, tmp_path / "x", options)
    with pytest.raises(RewardError, match="does not mark"):
        train.sft(tiny_gguf("llama"), rows, tmp_path / "x", options, template=plain)
    plain.write_text("{% for m in messages %}")
    with pytest.raises(RewardError, match=r"plain\.jinja, line 1"):
        train.sft(tiny_gguf("llama"), ROWS, tmp_path / "x", options, template=plain)
    assert not (tmp_path / "x").exists()


def test_an_adapter_belongs_to_its_base(tiny_gguf, tmp_path):
    train.sft(tiny_gguf("llama"), ROWS, tmp_path / "primed", SFT)
    with pytest.raises(AdapterError, match=r"was trained on llama-Q4_0\.gguf .*, not on llama-Q8_0\.gguf"):
        train.grpo(tiny_gguf("llama", "Q8_0"), ROWS, [letters], tmp_path / "other", GRPO, adapter=tmp_path / "primed")
    assert not (tmp_path / "other").exists()
    (tmp_path / "primed" / bases.BINDING).unlink()
    with pytest.raises(AdapterError, match="has no quantkit_base.json"):
        train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "other", GRPO, adapter=tmp_path / "primed")


def test_tokens_count_alike_however_batches_are_accumulated(tiny_gguf, tmp_path):
    """Completions of very different lengths: one batch of 8, and 8 of one, give the same step."""
    rows = [{"prompt": "Say it.", "completion": "word " * (1 + 3 * n)} for n in range(8)]
    found = []
    for batch in (1, 8):
        options = SftOptions(steps=1, batch=batch, together=8, learning_rate=1e-2, warmup=0, lora=LoraOptions(rank=4))
        outcome = train.sft(tiny_gguf("llama"), rows, tmp_path / str(batch), options)
        found.append((outcome.log[0]["grad_norm"], outcome.log[0]["loss"], weights(tmp_path / str(batch))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for key, value in found[0][2].items():
        assert torch.allclose(value, found[1][2][key], atol=2e-4), key


def stopped(folder: Path, step: int):
    """A reward that stops the run when the log says that so many steps are done."""

    def reward(prompts, completions, **columns):
        log = folder / "log.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            raise KeyboardInterrupt
        return letters(prompts, completions)

    reward.__name__ = "letters"
    return reward


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tiny_gguf, tmp_path):
    whole = train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "whole", GRPO)
    with pytest.raises(KeyboardInterrupt):
        train.grpo(tiny_gguf("llama"), ROWS, [stopped(tmp_path / "parts", 3)], tmp_path / "parts", GRPO)
    assert not (tmp_path / "parts" / "adapter_model.safetensors").exists()
    cut = tmp_path / "parts" / "checkpoints" / "checkpoint-3"  # as a kill in the middle of writing leaves it
    cut.mkdir()
    with pytest.raises(OutputError, match="--resume goes on"):
        train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "parts", GRPO)
    with pytest.raises(AdapterError, match="nothing to resume"):
        train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "mistyped", GRPO, resume=True)
    with pytest.raises(AdapterError, match="another data"):
        train.grpo(tiny_gguf("llama"), ROWS[:7], [letters], tmp_path / "parts", GRPO, resume=True)
    outcome = train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "parts", GRPO, resume=True)
    assert not cut.exists() and outcome.steps == whole.steps == 4
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[key]), key
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    logs = [[{k: v for k, v in row.items() if k not in timed} for row in log] for log in (whole.log, outcome.log)]
    assert logs[0] == logs[1]
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (tmp_path / "parts" / "samples.jsonl").read_text()


def test_what_grpo_logs_and_keeps(tiny_gguf, tmp_path):
    outcome = train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "run", GRPO)
    row = outcome.log[0]
    for name in (
        "rewards/letters/mean",
        "groups/dead",
        "groups/dead_nothing",
        "entropy",
        "kl",
        "completions/mean_length",
        "grad_norm",
    ):
        assert np.isfinite(row[name]), name
    assert row["sampling/sampling_logp_difference/max"] < 1e-4  # the engine torch is the trainer's own model
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1, 2, 3} and len(samples) == 4 * 2 * GRPO.generations
    for step in range(4):
        group = [sample for sample in samples if sample["step"] == step and sample["group"] == 0]
        rewards = np.array([sample["rewards"]["letters"] for sample in group])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        assert np.allclose([sample["advantage"] for sample in group], expected, atol=1e-4)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["run"]["method"] == "grpo" and said["seconds"] > 0 and said["versions"]["trl"]


def test_a_full_disk_costs_no_more_than_the_newest_checkpoint(tiny_gguf, tmp_path, monkeypatch):
    from transformers import Trainer

    save = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(AdapterError, match=r"checkpoint-4 could not be written .*checkpoint-2 is there to go on from"):
        train.sft(tiny_gguf("llama"), ROWS, tmp_path / "run", SFT)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train.sft(tiny_gguf("llama"), ROWS, tmp_path / "run", SFT, resume=True).steps == 4
    train.sft(tiny_gguf("llama"), ROWS, tmp_path / "whole", SFT)
    assert all(torch.equal(value, weights(tmp_path / "run")[key]) for key, value in weights(tmp_path / "whole").items())


def test_options_that_do_not_come_out_even_are_refused(tiny_gguf, tmp_path):
    with pytest.raises(AdapterError, match="10 sequences a step are no multiple of a batch of 4"):
        train.sft(tiny_gguf("llama"), ROWS, tmp_path / "a", SftOptions(together=10))
    for change, words in (
        ({"together": 18}, "18 completions a step are no multiple of groups of 4"), ({"generations": 1}, "no advantage"),
        ({"loss": "ppo"}, "no loss 'ppo'"), ({"temperature": 0.0}, "above 0"), ({"weights": (1.0, 2.0)}, "2 weights for 1 rewards"),
        ({"engine": "magic"}, "no engine 'magic'"), ({"together": 64}, "8 rows are too few for 16 prompts"), ({"max_length": 8}, "exceeds 8"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=words):
            train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "b", GrpoOptions(**{**vars(GRPO), **change}))
        assert not (tmp_path / "b").exists()


def test_a_base_is_known_on_every_device_and_keeps_its_angles(tiny_gguf):
    """In bfloat16, as on a GPU: the same hash, other bytes in memory, rotary frequencies still in float32."""
    plain, half = bases.open_base(tiny_gguf("llama")), bases.open_base(tiny_gguf("llama"), torch.bfloat16)
    assert plain.digest == half.digest and plain.held != half.held
    frequencies = [base.model.model.rotary_emb.inv_freq for base in (plain, half)]
    assert frequencies[1].dtype == torch.float32 and torch.equal(*frequencies)
    assert half.model.model.norm.weight.dtype == torch.bfloat16


def test_what_was_primed_goes_with_the_adapter_and_rewards_get_the_rows_as_they_are(tiny_gguf, tmp_path):
    """The template of priming is used again; columns of any types reach the reward unchanged, None where a row has none."""
    template = tmp_path / "tags.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    train.sft(tiny_gguf("llama"), ROWS, tmp_path / "primed", SFT, template=template)
    seen = []

    def reward(prompts, completions, tests, **columns):
        seen.extend(zip(tests, columns["extra"], strict=True))
        return [0.0] * len(completions)

    odd = [{"a": 1}, {"b": [1, "x"]}, [1, 2.5], "text", None, 3, [[1], 2], {}]
    rows = [
        {**row, "tests": value, **({"extra": n} if n > 3 else {})} for n, (row, value) in enumerate(zip(ROWS, odd, strict=True))
    ]
    options = GrpoOptions(**{**vars(GRPO), "steps": 2})
    train.grpo(tiny_gguf("llama"), rows, [reward], tmp_path / "run", options, adapter=tmp_path / "primed")
    assert all((value, n if n > 3 else None) in seen for n, value in enumerate(odd)) and len(seen) == 2 * 16
    assert "<think>" in json.loads((tmp_path / "run" / "run.json").read_text())["run"]["template"]
    with pytest.raises(AdapterError, match="is the adapter itself"):
        train.grpo(tiny_gguf("llama"), rows, [reward], tmp_path / "run", options, adapter=tmp_path / "run", force=True)
    with pytest.raises(AdapterError, match="has rank 4, not 8"):
        other = GrpoOptions(**{**vars(options), "lora": LoraOptions(rank=8)})
        train.grpo(tiny_gguf("llama"), rows, [reward], tmp_path / "x", other, adapter=tmp_path / "run")
    with pytest.raises(AdapterError, match="no packed experts"):
        train.sft(tiny_gguf("llama"), ROWS, tmp_path / "x", SftOptions(lora=LoraOptions(experts=True)))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists() and not (tmp_path / "x").exists()


def test_llama_cpp_draws_with_the_live_adapter(tiny_gguf, tmp_path):
    """A run with its completions: other tokens than torch's, a small mismatch that is corrected, every step's own adapter."""
    options = GrpoOptions(**{**vars(GRPO), "engine": "llama", "steps": 3, "learning_rate": 3e-2})
    base = bases.open_base(tiny_gguf("qwen3_moe"))
    outcome = train.grpo(tiny_gguf("qwen3_moe"), ROWS, [letters], tmp_path / "llama", options)
    apart = [row["sampling/sampling_logp_difference/mean"] for row in outcome.log if "kl" in row]
    assert len(apart) == 3 and 1e-5 < max(apart) < 0.3  # the old adapter would be off by far more after such steps
    assert outcome.log[-2]["kl"] > 0 and bases.digest_of(base.model) == base.held
    with pytest.raises(AdapterError, match="that exceeds 12"):
        train.grpo(tiny_gguf("llama"), ROWS, [letters], tmp_path / "short", GrpoOptions(**{**vars(options), "max_length": 12}))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_preferences_move_the_margin(tiny_gguf, tmp_path, loss):
    """Chosen answers become likelier than rejected ones, measured against the base without the adapter."""
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no idea"} for row in ROWS]
    marked = [
        {"prompt": p["prompt"], "completion": p[name], "label": name == "chosen"}
        for p in pairs
        for name in ("chosen", "rejected")
    ]
    options = DpoOptions(steps=6, batch=4, together=8, learning_rate=1e-2, loss=loss, lora=LoraOptions(rank=4))
    outcome = train.dpo(tiny_gguf("llama"), pairs if loss == "dpo" else marked, tmp_path / "run", options)
    margins = [row["rewards/margins"] for row in outcome.log if "rewards/margins" in row]
    assert len(margins) == 6 and margins[-1] > margins[0] + 0.1
    again = train.dpo(
        tiny_gguf("llama"),
        pairs,
        tmp_path / "again",
        DpoOptions(**{**vars(options), "loss": "dpo", "steps": 1}),
        adapter=tmp_path / "run",
    )
    assert abs(again.log[0]["rewards/margins"]) < 1e-4  # the reference is where this training began


@pytest.mark.parametrize("plan", ["uniform:NF4_DQ", "uniform:W4A16_G32", "uniform:NVFP4", "uniform:BF16", "Q2_K"])
def test_any_artifact_can_be_a_base(tiny_folder, tmp_path, plan):
    """Folders of bitsandbytes (double quantization) and compressed-tensors, a file of several types, full precision: none changes."""
    path = tmp_path / ("base" if plan.endswith(("NF4_DQ", "G32")) else "base.gguf")
    api.quantize(tiny_folder("llama"), path, plan, use_importance=False)
    before = bases.digest_of_files(open_checkpoint(path))
    outcome = train.sft(path, ROWS, tmp_path / "primed", SftOptions(**{**vars(SFT), "steps": 3}))
    losses = [row["loss"] for row in outcome.log if "loss" in row]
    assert losses[-1] < losses[0] and bases.digest_of_files(open_checkpoint(path)) == before
    assert json.loads((tmp_path / "primed" / bases.BINDING).read_text())["digest"] == before
    packed = {m.formats["weight"] for m in bases.open_base(path).model.modules() if isinstance(m, QuantLinear)}
    assert len(packed) >= {"uniform:BF16": 0, "Q2_K": 2}.get(plan, 1)
