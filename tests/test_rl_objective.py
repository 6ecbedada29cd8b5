"""GRPO against hand calculation, drawing of completions, and estimates from them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.passk import majority_at_k, pass_at_k
from quantkit.rl import rollouts
from quantkit.rl.plugin_rollouts import dead_groups
from quantkit.rl.rollouts import Completions, Drawer, Sampling, TorchEngine, cut


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A GRPO trainer on a tiny model; nothing is trained with it."""
    from datasets import Dataset
    from trl import GRPOConfig

    from quantkit.rl.base import open_base
    from quantkit.rl.folder import RunFolder
    from quantkit.rl.plugin_peft import lora_config, with_new_adapter
    from quantkit.rl.plugin_rollouts import GrpoTrainer

    folder = tmp_path_factory.mktemp("objective")
    base = open_base(tiny.build("llama", folder / "model"))
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=4, loss_type="grpo",
        epsilon=0.2, epsilon_high=0.2, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, router_aux_loss_coef=0.0,
    )  # fmt: skip
    return GrpoTrainer(
        model=with_new_adapter(base.model, lora_config(base.model, 2)), reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=arguments, train_dataset=Dataset.from_list([{"prompt": "a", "quantkit_row": 0}]), processing_class=base.tokenizer, engine=TorchEngine(),
        folder=RunFolder(folder), rows=[{"prompt": "a"}], window=512,
    )  # fmt: skip


def advantages(trainer, rewards: list[float], monkeypatch) -> list[float]:
    """What the trainer makes of the rewards of one group."""
    found = Completions([[5, 6]] * 4, [[-1.0, -1.0]] * 4)
    monkeypatch.setattr(trainer.engine, "complete", lambda *_: found)
    monkeypatch.setattr(trainer, "reward_funcs", [lambda completions, **_: rewards])
    trainer.model.train()
    out = trainer._generate_and_score_completions([{"prompt": "a", "quantkit_row": 0}] * 4)
    return out["advantages"].tolist()


def test_advantages_are_distances_in_sample_deviations(trainer, monkeypatch):
    """Rewards 0, 0, 0, 1: mean ¼, sample deviation ½, so 1.5 (with the population's, 0.433, it would be 1.73)."""
    assert advantages(trainer, [0, 0, 0, 1], monkeypatch) == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-3)
    assert advantages(trainer, [2, 2, 2, 2], monkeypatch) == [0, 0, 0, 0]
    assert advantages(trainer, [0, 1, 0, 1], monkeypatch) == pytest.approx([-0.866, 0.866, -0.866, 0.866], abs=1e-3)


@pytest.mark.parametrize("ratio, advantage, value, slope", [
    (99.0, 1.0, 1.2, 0.0), (99.0, -1.0, -99.0, -99.0), (1 / 99, 1.0, 1 / 99, 1 / 99), (1 / 99, -1.0, -0.8, 0.0), (1.1, 1.0, 1.1, 1.1),
])  # fmt: skip
def test_the_objective_is_clipped_where_it_should(trainer, monkeypatch, ratio, advantage, value, slope):
    """min(r·A, clip(r, 0.8, 1.2)·A): the value, and its slope in log r."""
    now = torch.tensor([[math.log(ratio)]], requires_grad=True)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (now, torch.zeros(1, 1), None))
    monkeypatch.setattr(trainer, "beta", 0.0)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1, raising=False)
    one = torch.ones(1, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": one, "prompt_mask": one, "completion_ids": one, "completion_mask": one, "advantages": torch.tensor([advantage]),
        "old_per_token_logps": torch.zeros(1, 1), "importance_sampling_ratio": torch.ones(1, 1), "num_items_in_batch": torch.tensor(1),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert -float(loss) == pytest.approx(value, rel=1e-5) and -float(now.grad) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_dead_groups_are_told_apart():
    rewards = torch.tensor([[0.0, 0, 0], [1, 1, 1], [-1, -1, -1], [0, 1, 0]])
    assert dead_groups(rewards) == {"dead": 0.75, "dead_nothing": 0.5, "dead_all": 0.25}


# ── drawing ──


def sampling(**changes) -> Sampling:
    return Sampling(**{"count": 6, "temperature": 0.8, "ends": [1], "pad": 0, **changes})


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    counts, n = torch.zeros(5), 4000
    drawer = Drawer([torch.Generator().manual_seed(3)] * n, sampling())
    counts += torch.bincount(drawer(None, logits.expand(n, -1)).argmax(-1), minlength=5)
    expected = torch.softmax(logits[0] / 0.8, -1)
    assert torch.allclose(counts / n, expected, atol=4 * math.sqrt(0.25 / n))
    said = {row[0] for row in drawer._scores}
    assert all(any(abs(math.exp(value) - share) < 1e-6 for share in expected.tolist()) for value in said)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.5, "min_p": 0.01}])
def test_what_is_cut_off_is_what_transformers_cuts_off(options):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.log_softmax(3 * torch.randn(40, 100, generator=torch.Generator().manual_seed(0)), -1)
    expected = scores
    if "top_k" in options:
        expected = TopKLogitsWarper(options["top_k"])(None, expected)
    if "top_p" in options:
        expected = TopPLogitsWarper(options["top_p"])(None, expected)
    if "min_p" in options:
        kept = MinPLogitsWarper(options["min_p"])(None, scores).isfinite()
        expected = expected.masked_fill(~kept, -torch.inf)
    assert torch.equal(cut(scores, sampling(**options)).isfinite(), expected.isfinite())


def test_completions_do_not_depend_on_batches_or_memory(trainer, monkeypatch):
    """Prompts of different lengths together or alone; a GPU that runs out of memory; probabilities are the model's."""
    model, prompts = trainer.model.eval(), [[5, 6, 7], [9], [5, 6, 7, 8, 9, 10]]
    whole = TorchEngine().complete(model, prompts, sampling(seed=4))
    alone = TorchEngine(batch=1).complete(model, prompts, sampling(seed=4))
    assert whole.ids == alone.ids and len({tuple(ids) for ids in whole.ids}) == 3
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(whole.log_probabilities, alone.log_probabilities, strict=True))
    part, calls = TorchEngine._part, []

    def full(self, model, some, *rest):
        calls.append(len(some))
        if len(some) > 1:
            raise torch.OutOfMemoryError("no memory")
        return part(self, model, some, *rest)

    monkeypatch.setattr(TorchEngine, "_part", full)
    assert TorchEngine(batch=4).complete(model, prompts, sampling(seed=4)).ids == whole.ids and calls == [3, 2, 1, 1, 1]
    for prompt, ids, found in zip(prompts, whole.ids, whole.log_probabilities, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert np.allclose(found, expected, atol=1e-4)
        assert 1 not in ids[:-1]
    assert TorchEngine().complete(model, prompts, sampling(seed=4, step=1)).ids != whole.ids
    assert rollouts.Sampling(**vars(sampling())).stream(0) != sampling(turn=1).stream(0)


# ── estimates ──


@settings(max_examples=60, deadline=None)
@given(verdicts=st.lists(st.booleans(), min_size=1, max_size=8), data=st.data())
def test_pass_at_k_is_the_mean_over_all_sets(verdicts, data):
    k = data.draw(st.integers(1, len(verdicts)))
    expected = np.mean([any(some) for some in itertools.combinations(verdicts, k)])
    assert pass_at_k(len(verdicts), sum(verdicts), k) == pytest.approx(expected)
    answers = ["right" if verdict else "wrong" for verdict in verdicts]
    assert majority_at_k(answers, verdicts, 1) == pytest.approx(np.mean(verdicts))


def test_majorities():
    answers, right = ["4", "4", "5", None], [True, True, False, False]
    assert majority_at_k(answers, right, 4) == 1 and majority_at_k(answers, right, 1) == 0.5
    assert majority_at_k(["4", "5"], [True, False], 2) == 0.5
    assert majority_at_k([None, None], [False, False], 2) == 0
    many = ["a"] * 20 + ["b"] * 20
    assert majority_at_k(many, [True] * 20 + [False] * 20, 9) == pytest.approx(0.5, abs=0.03)
    for bad in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)
    with pytest.raises(ValueError):
        majority_at_k(["a"], [True], 2)
