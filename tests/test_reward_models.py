"""Reward models: what they learn, what they refuse, and that a score is the same alone, in a batch and in stock libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from quantkit.cli.rl.reward_model import command
from quantkit.errors import AdapterError, RewardError
from quantkit.modeling.modules import QuantLinear
from quantkit.rl import base as bases
from quantkit.rl import train
from quantkit.rl.options import GrpoOptions, LoraOptions, SftOptions
from quantkit.rl.reward_model import RewardModelOptions, reward_model
from quantkit.rl.rewards import audited, checked, learned, named, text_of
from quantkit.rl.rewards.learned import token_ids

ROWS = [{"prompt": f"Say {n}.", "chosen": f"{n} and {n}", "rejected": "no idea" + ", none" * (n % 5)} for n in range(24)]
OPTIONS = RewardModelOptions(steps=6, batch=2, together=4, learning_rate=1e-2, save_every=2, lora=LoraOptions(rank=4))


def changed(**changes) -> RewardModelOptions:
    return RewardModelOptions(**{**vars(OPTIONS), **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tiny_gguf, tmp_path_factory):
    """(base, folder) of a reward model that training has finished, and what it said."""
    folder = tmp_path_factory.mktemp("reward-model")
    return tiny_gguf("llama"), folder / "rm", reward_model(tiny_gguf("llama"), ROWS, folder / "rm", OPTIONS)


def scores(reward, rows, name) -> list[float]:
    return reward(prompts=[row["prompt"] for row in rows], completions=[row[name] for row in rows])


def test_pairs_teach_a_score_on_a_packed_base_whose_bytes_stay(trained):
    base, folder, found = trained
    assert found.held == 3 and found.after == 1 > found.before  # a tenth of 24 prompts, rounded up
    steps = [row for row in found.log if "loss" in row]
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"] - 0.2 and steps[-1]["accuracy"] == 1 > steps[0]["accuracy"]
    assert json.loads((folder / "run.json").read_text())["ranked"] == {"held": 3, "before": found.before, "after": 1.0}
    opened = bases.open_base(base)
    assert json.loads((folder / bases.BINDING).read_text())["digest"] == opened.digest
    assert any(isinstance(module, QuantLinear) for module in opened.model.modules())
    kept = weights(folder)
    assert kept["base_model.model.score.weight"].shape == (1, 64)
    assert {key for key in kept if "lora_" not in key} == {"base_model.model.score.weight"}


def test_experts_get_pairs_too_and_memory_is_saved_with_the_same_result(tiny_gguf, tmp_path):
    lora = LoraOptions(rank=4, experts=True)
    plain = reward_model(tiny_gguf("qwen3_moe"), ROWS, tmp_path / "plain", changed(lora=lora, steps=3))
    saving = reward_model(tiny_gguf("qwen3_moe"), ROWS, tmp_path / "saving", changed(lora=lora, steps=3, save_memory=True))
    assert any("experts.lora_B_down_proj" in key for key in weights(tmp_path / "plain"))
    assert [row["loss"] for row in plain.log[:3]] == pytest.approx([row["loss"] for row in saving.log[:3]], abs=1e-5)


def test_a_score_is_the_same_alone_and_in_a_batch(trained):
    base, folder, _ = trained
    many, single = learned(folder, base, batch=32), learned(folder, base, batch=1)
    rows = [{"prompt": f"Say {n}.", "said": "a word " * (1 + 7 * n)} for n in range(6)] + [{"prompt": "?", "said": "<|pad|>" * 3}]
    together = scores(many, rows, "said")
    assert together == pytest.approx([scores(single, [row], "said")[0] for row in rows], abs=1e-5)
    assert max(together) - min(together) > 1e-2
    some = learned(folder, base, batch=3)
    assert scores(some, rows[::-1], "said")[::-1] == scores(some, rows, "said") == pytest.approx(together, abs=1e-5)


def test_tokens_that_pad_may_end_a_sequence(trained):
    """As where a model has no token for padding of its own, and the end of a text pads."""
    from quantkit.rl.plugin_peft import with_adapter
    from quantkit.rl.plugin_reward_model import scorer
    from quantkit.rl.plugin_reward_model import scores as of_ids

    base, folder, _ = trained
    opened = bases.open_base(base)
    model, pad = with_adapter(scorer(opened), str(folder)), opened.tokenizer.pad_token_id
    sequences = [[40, 41, pad], [42, 43, 44, 45, 46, pad, pad], [47], [48, 49, 50]]
    together = of_ids(model, sequences, pad, 4)
    assert together == pytest.approx([of_ids(model, [ids], pad, 1)[0] for ids in sequences], abs=1e-5)
    assert together[0] == pytest.approx(of_ids(model, [[40, 41]], pad, 1)[0], abs=1e-5)


def test_stock_transformers_and_peft_give_the_same_score(tiny_folder, tmp_path):
    """The folder of a reward model on a base in full precision is one of PEFT's, tokens and place of the score included."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_folder("llama")
    reward_model(folder, ROWS, tmp_path / "rm", OPTIONS)
    ours = scores(learned(tmp_path / "rm", folder), ROWS[:4], "rejected")
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    for row, score in zip(ROWS[:4], ours, strict=True):
        talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            assert stock(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-4)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tiny_gguf, trained, tmp_path, monkeypatch):
    from quantkit.rl.plugin_reward_model import PairTrainer

    base, whole, found = trained
    log = PairTrainer.log

    def stop(self, logs, *more):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        log(self, logs, *more)

    monkeypatch.setattr(PairTrainer, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        reward_model(base, ROWS, tmp_path / "parts", OPTIONS)
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "adapter_model.safetensors").exists()
    with pytest.raises(AdapterError, match="another data"):
        reward_model(base, ROWS[:-1], tmp_path / "parts", OPTIONS, resume=True)
    again = reward_model(base, ROWS, tmp_path / "parts", OPTIONS, resume=True)
    assert (again.steps, again.before, again.after) == (found.steps, found.before, found.after)
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path / "parts")[key]), key


def test_centering_keeps_scores_near_zero(tiny_gguf, tmp_path):
    sizes = {}
    for center in (0.0, 10.0):
        reward_model(tiny_gguf("llama"), ROWS, tmp_path / str(center), changed(center=center))
        found = [scores(learned(tmp_path / str(center), tiny_gguf("llama")), ROWS, name) for name in ("chosen", "rejected")]
        sizes[center] = sum((a + b) ** 2 for a, b in zip(*found, strict=True))
    assert sizes[10.0] < sizes[0.0] / 2


def test_training_begins_with_a_primed_adapter_or_another_reward_model(tiny_gguf, trained, tmp_path):
    base, folder, found = trained
    primed = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    train.sft(
        base, primed, tmp_path / "primed", SftOptions(steps=2, batch=4, together=8, learning_rate=1e-2, lora=LoraOptions(rank=4))
    )
    still = changed(steps=1, learning_rate=0.0, lora=LoraOptions())
    reward_model(base, ROWS, tmp_path / "begun", still, adapter=tmp_path / "primed")
    begun, before = weights(tmp_path / "begun"), weights(tmp_path / "primed")
    assert set(begun) == {*before, "base_model.model.score.weight"} and all(
        torch.equal(begun[key], before[key]) for key in before
    )
    more = reward_model(base, ROWS, tmp_path / "more", still, adapter=folder)
    assert more.before == more.after == found.after
    assert all(torch.equal(value, weights(tmp_path / "more")[key]) for key, value in weights(folder).items())
    with pytest.raises(AdapterError, match="has rank 4, not 8"):
        reward_model(base, ROWS, tmp_path / "x", changed(lora=LoraOptions(rank=8)), adapter=folder)
    with pytest.raises(AdapterError, match="is the adapter itself"):
        reward_model(base, ROWS, folder, still, adapter=folder, force=True)


def test_pairs_of_a_prompt_are_not_torn_apart(tiny_gguf, tmp_path):
    """What is kept to measure on has prompts that training never saw; a single prompt is divided by rows."""
    from quantkit.rl.reward_model import _held

    rows = [{"prompt": f"Say {n // 4}.", "chosen": str(n), "rejected": "no"} for n in range(48)]
    held = _held(rows, 0)
    assert len(held) == 8 and {rows[n]["prompt"] for n in held}.isdisjoint(rows[n]["prompt"] for n in range(48) if n not in held)
    assert _held(rows, 0) == held != _held(rows, 1)
    assert len(_held([{**row, "prompt": "Say."} for row in rows], 0)) == 5
    found = reward_model(tiny_gguf("llama"), ROWS[:2], tmp_path / "two", changed(steps=1))
    assert found.held == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "the data, row 2: an empty field 'chosen'"),
        ({"rejected": ""}, "the data, row 2: an empty field 'rejected'"),
        ({"prompt": 3}, "row 2: prompt is neither text nor messages"),
        ({"chosen": [{"role": "assistant"}]}, "row 2: chosen is neither text nor messages"),
        ({"rejected": "1 and 1"}, "row 2: chosen and rejected are the same"),
        ({"rejected": [{"role": "assistant", "content": "1 and 1"}]}, "row 2: chosen and rejected are the same"),
        ({"rejected": "word " * 200}, r"row 2 has \d+ tokens, which exceeds 64"),
    ],
)
def test_rows_that_teach_nothing_are_refused_by_number(tiny_gguf, tmp_path, change, words):
    rows = [ROWS[0], {**ROWS[1], **change}, ROWS[2]]
    with pytest.raises((RewardError, AdapterError), match=words):
        reward_model(tiny_gguf("llama"), rows, tmp_path / "x", changed(max_length=64))
    assert not (tmp_path / "x").exists()


def test_a_template_that_refuses_a_row_is_an_error_with_its_words(tiny_gguf, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0]['role'] == 'user' %}{{ raise_exception('the system comes first') }}{% endif %}")
    with pytest.raises(RewardError, match=r"refuses the prompt 'Say 0\.' with its answer \(the system comes first\)"):
        reward_model(tiny_gguf("llama"), ROWS, tmp_path / "x", OPTIONS, template=template)
    assert not (tmp_path / "x").exists()


def test_one_pair_is_too_few(tiny_gguf, tmp_path):
    with pytest.raises(RewardError, match="has one pair"):
        reward_model(tiny_gguf("llama"), ROWS[:1], tmp_path / "x", OPTIONS)


def test_the_command_says_what_was_learned_and_what_is_wrong(tiny_gguf, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({**row, "prompt": None, "question": row["prompt"]}) + "\n" for row in ROWS))
    options = ["--rank", "4", "--steps", "6", "--batch", "2", "--together", "4", "--learning-rate", "0.01", "--center", "0.01"]
    args = [str(tiny_gguf("llama")), "--data", str(data), "-o", str(tmp_path / "rm"), *options]
    bad = CliRunner().invoke(command, args)
    assert bad.exit_code == 1 and "pairs.jsonl, row 1: an empty field 'prompt'" in bad.output and not (tmp_path / "rm").exists()
    good = CliRunner().invoke(command, [*args, "--field", "prompt=question"])
    assert good.exit_code == 0, good.output
    assert "of 3 pairs kept apart" in good.output and "were ranked right before, 100% are now" in good.output
    said = CliRunner().invoke(command, [*args, "--field", "prompt=question", "--force", "--json"])
    assert json.loads(said.stdout)["after"] == 1.0 and json.loads(said.stdout)["held"] == 3


# Learned rewards


def test_a_learned_reward_scores_texts_and_messages_and_is_loaded_once(trained, monkeypatch):
    base, folder, _ = trained
    opened = []
    open_base = bases.open_base
    monkeypatch.setattr(bases, "open_base", lambda *args: opened.append(args) or open_base(*args))
    reward = checked(learned(folder, base, name="taste"))
    assert reward.__name__ == "taste" and not opened
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    texts = scores(reward, ROWS, "chosen")
    assert torch.equal(torch.rand(1), expected)  # loading leaves training's random numbers alone
    spoken = reward(
        prompts=[[{"role": "user", "content": row["prompt"]}] for row in ROWS],
        completions=[[{"role": "assistant", "content": row["chosen"]}] for row in ROWS],
    )
    assert texts == spoken and len(opened) == 1
    worse = scores(reward, ROWS, "rejected")
    assert sum(a > b for a, b in zip(texts, worse, strict=True)) == len(ROWS)


def test_grpo_trains_on_a_learned_reward_with_an_audit_beside_it(trained, tmp_path):
    """The log has both, the advantages only the learned one."""
    base, folder, _ = trained
    exact = named("letters", lambda completions, **_: [float(text_of(said).count("a")) for said in completions])
    reward = audited(learned(folder, base), exact)
    options = GrpoOptions(
        steps=2, generations=4, together=16, batch=8, completion=6, learning_rate=1e-2, lora=LoraOptions(rank=4)
    )
    found = train.grpo(base, [{"prompt": row["prompt"]} for row in ROWS], [reward], tmp_path / "run", options)
    first = found.log[0]
    assert first["audit/learned/audited"] == pytest.approx(first["rewards/learned/mean"], abs=1e-6)
    assert first["reward"] == pytest.approx(first["rewards/learned/mean"]) and "rewards/letters/mean" not in first
    assert first["audit/learned/exact"] > 0 and first["audit/learned/alarm"] == 0 and "agreement" in reward.audit.metrics()


def test_a_long_text_counts_by_its_end(trained):
    base, folder, _ = trained
    reward, short = learned(folder, base), learned(folder, base, limit=24)
    row = {"prompt": "Say it.", "said": "word " * 2000}  # longer than it was trained with
    assert len(token_ids(bases.open_base(base).tokenizer, row["prompt"], row["said"], 1024)) == 1024
    assert all(isinstance(value, float) for value in scores(reward, [row], "said"))
    other = {**row, "prompt": "Another prompt, which is cut off as well."}
    assert scores(short, [row], "said") == scores(short, [other], "said")


def test_an_adapter_of_another_base_or_kind_is_refused_by_name(trained, tiny_gguf, tmp_path):
    base, folder, _ = trained
    with pytest.raises(RewardError, match=r"rm was trained on llama-Q4_0\.gguf .*, not on llama-Q8_0\.gguf"):
        scores(checked(learned(folder, tiny_gguf("llama", "Q8_0"))), ROWS, "chosen")
    train.sft(base, [{"prompt": "a", "completion": "b"}] * 4, tmp_path / "words", SftOptions(steps=1, batch=2, together=2))
    with pytest.raises(RewardError, match="words is an adapter that writes, none that scores"):
        scores(learned(tmp_path / "words", base), ROWS, "chosen")
    with pytest.raises(RewardError, match="is an adapter; give its base as well"):
        learned(folder)
    with pytest.raises(RewardError, match="is no model that scores"):
        learned(tmp_path / "nowhere", base)


@pytest.fixture(scope="module")
def classifier(tiny_folder, tmp_path_factory):
    """Folder of a sequence classifier with so many labels."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def get(labels: int) -> Path:
        folder = tmp_path_factory.mktemp("classifiers") / f"{labels}"
        torch.manual_seed(labels)
        names = {n: f"mood {n}" for n in range(labels)}
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_folder("llama"), num_labels=labels, id2label=names, label2id={name: n for n, name in names.items()}
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_folder("llama")).save_pretrained(folder)
        return folder

    return get


def test_any_classifier_can_be_a_reward(classifier):
    """The logit of the chosen label, as transformers computes it for one text; the same in a batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = classifier(3)
    found = scores(learned(folder, label="mood 2", batch=4), ROWS[:5], "rejected")
    assert found == pytest.approx(scores(learned(folder, label=2, batch=1), ROWS[:5], "rejected"), abs=1e-5)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    for row, score in zip(ROWS, found, strict=False):
        talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}]
        with torch.no_grad():
            logits = model(**tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)).logits
        assert score == pytest.approx(logits[0, 2].item(), abs=1e-5)
    alone = scores(learned(classifier(1), alone=True), ROWS[:2], "chosen")
    assert alone == scores(learned(classifier(1), alone=True), [{**row, "prompt": "Other."} for row in ROWS[:2]], "chosen")


@pytest.mark.parametrize(
    ("label", "words"),
    [(None, r"has 3 labels; choose one with label=: 0 \(mood 0\)"), ("joy", "no label 'joy'"), (3, "no label 3")],
)
def test_a_label_must_be_chosen_and_known(classifier, label, words):
    with pytest.raises(RewardError, match=words):
        scores(learned(classifier(3), label=label), ROWS, "chosen")


def test_folders_that_are_no_classifiers(classifier, tiny_folder, tmp_path):
    """Pickles, heads that would be drawn at random, broken folders, code of their own."""
    with pytest.raises(RewardError, match=r"has no weights for score\.weight"):
        scores(learned(tiny_folder("llama"), label=0), ROWS, "chosen")
    folder = classifier(1)
    weight = folder / "model.safetensors"
    torch.save(load_file(weight), folder / "pytorch_model.bin")
    data = weight.read_bytes()
    weight.unlink()
    with pytest.raises(RewardError, match="has no weights in safetensors"):
        scores(learned(folder), ROWS, "chosen")
    weight.write_bytes(data[:100])
    with pytest.raises(RewardError, match="cannot be loaded as a sequence classifier"):
        scores(learned(folder), ROWS, "chosen")
    weight.write_bytes(data)
    tiny.rewrite_config(folder, model_type="own", auto_map={"AutoModelForSequenceClassification": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(RewardError, match="cannot be loaded as a sequence classifier"):
        scores(learned(folder), ROWS, "chosen")
    with pytest.raises(RewardError, match="is a whole model; leave out the base"):
        learned(folder, tmp_path)


def test_texts_and_messages_without_a_template(tiny_gguf):
    tokenizer = bases.open_base(tiny_gguf("llama")).tokenizer
    tokenizer.chat_template, tokenizer.truncation_side = None, "left"
    end = tokenizer.eos_token_id
    joined = token_ids(tokenizer, "One ", "two")
    assert joined == [*tokenizer("One two").input_ids, end] and token_ids(tokenizer, None, "two")[-1] == end
    assert token_ids(tokenizer, [{"role": "user", "content": "One"}], "two") == [*tokenizer("One\ntwo").input_ids, end]
    assert token_ids(tokenizer, "One ", "two", 2)[-1] == end and len(token_ids(tokenizer, "One ", "two " * 9, 4)) == 4
