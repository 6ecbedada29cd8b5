"""Encoding one tensor after the other: the corrected weight is the textbook's, pairs belong together, runs go on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import quantkit
from quantkit.analysis.moments import MomentStore, column_blocks
from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.texts import load_calibration
from quantkit.analysis.windows import probe_windows
from quantkit.checkpoint import TensorInfo, open_checkpoint
from quantkit.encoders.ldlq import DAMPING
from quantkit.encoders.stats import ActivationStats
from quantkit.planning.dynamic import dynamic_plan
from quantkit.planning.policy import Policy
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer import pipeline, sequential
from quantkit.quantizer.sequential_inputs import Inputs, Pairs
from quantkit.quantizer.sequential_sums import Sums, add_up, expert_ranges

DOWN = TensorInfo("blk.0.ffn_down.weight", (24, 40), "F32")


@pytest.fixture(scope="module")
def planned(known, analyzed):
    (checkpoint, sensitivity, stats), text = known, analyzed[2]
    plan = dynamic_plan(checkpoint, sensitivity, stats, int(checkpoint.n_weights * 3.0 / 8) + 200_000, Policy())
    return checkpoint, stats, plan, load_calibration(checkpoint, [text], 8192)


def test_the_corrected_weight_is_the_textbooks_ridge_regression():
    """What W* y misses of W x + d is the least that a matrix can leave, with λ on what it changes."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((24, 40)), rng.standard_normal((500, 40))
    y = x + 0.3 * rng.standard_normal((500, 40)) @ rng.standard_normal((40, 40)) / 6
    lacking = rng.standard_normal((500, 24))
    sums = Sums(DOWN)
    for part in (slice(0, 200), slice(200, 500)):
        pair = [torch.from_numpy(a[part]).float() for a in (x, y, lacking)]
        sums.add(Pairs(DOWN.name, 0, *pair))
    found = sums.target(weight.astype(np.float32), 0)
    ridge = DAMPING * np.square(y).sum() / 40
    design = np.vstack([y, np.sqrt(ridge) * np.eye(40)])
    wanted = np.vstack([x @ weight.T + lacking - y @ weight.T, np.zeros((40, 24))])
    change = np.linalg.lstsq(design, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found, weight + change, rtol=1e-3, atol=1e-4)
    left = np.square(x @ weight.T + lacking - y @ found.T).sum() / np.square(x @ weight.T + lacking - y @ weight.T).sum()
    assert left < 0.98
    moments = sums.moments(0)
    np.testing.assert_allclose(moments.read()[0], y.T @ y / 500, rtol=1e-4, atol=1e-5)


def test_too_few_tokens_change_nothing_and_known_statistics_are_used():
    sums = Sums(DOWN)
    x = torch.randn(39, 40)
    sums.add(Pairs(DOWN.name, 0, x, 2 * x, torch.randn(39, 24)))
    weight = np.ones((24, 40), np.float32)
    assert np.array_equal(sums.target(weight, 0), weight)
    assert sums.moments(0) is None
    stats = sums.stats(ActivationStats(), DOWN)
    assert stats.importance(DOWN.name) is None


def test_long_rows_are_corrected_block_by_block(monkeypatch):
    monkeypatch.setattr("quantkit.quantizer.sequential_sums.column_blocks", lambda columns: column_blocks(columns, 10))
    rng = np.random.default_rng(1)
    x, y = (torch.from_numpy(rng.standard_normal((300, 40))).float() for _ in range(2))
    sums, apart = Sums(DOWN), Sums(replace(DOWN, shape=(24, 10)))
    sums.add(Pairs(DOWN.name, 0, x, y))
    apart.add(Pairs(DOWN.name, 0, x[:, 10:20], y[:, 10:20]))
    weight = rng.standard_normal((24, 40)).astype(np.float32)
    np.testing.assert_allclose(sums.target(weight, 0)[:, 10:20], apart.target(weight[:, 10:20], 0), rtol=1e-4, atol=1e-5)


def everything(infos):
    return {info.name: range(info.experts) for info in infos}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_pairs_of_two_equal_copies_are_equal_and_of_all_tensors(architecture, tmp_path):
    """Every tensor of every stage is seen, experts on the tokens that are routed to them, and nothing is lacking."""
    checkpoint = open_checkpoint(tiny.build(architecture, tmp_path / "m"))
    blocks = [sequential.Blocks(checkpoint) for _ in range(2)]
    ids = np.random.default_rng(0).integers(3, 4096, (2, 24)).astype(np.int64)
    states = blocks[0].embed(ids)
    with torch.inference_mode(), blocks[0].layer(0) as one, blocks[1].layer(0) as other:
        for roles in sequential.STAGES:
            infos = [info for info in checkpoint.tensors.values() if info.layer == 0 and info.role in roles]
            with Inputs(*blocks, 0, everything(infos)) as inputs:
                pairs = list(inputs.of(one, other, states, states.clone()))
            assert {pair.name for pair in pairs} == {info.name for info in infos}
            for pair in pairs:
                info = checkpoint.info(pair.name)
                assert pair.original.shape[1] == info.columns
                torch.testing.assert_close(pair.original, pair.quantized, rtol=1e-4, atol=1e-5)
                assert (pair.residual is not None) == (info.role in sequential.STAGES[1] | sequential.STAGES[3])
                if pair.residual is not None:
                    assert pair.residual.shape == (len(pair.quantized), info.rows // info.experts)
                    assert pair.residual.abs().max() < 1e-4
            tokens = sum(len(pair.quantized) for pair in pairs if checkpoint.info(pair.name).experts > 1)
            routed = [info for info in infos if info.experts > 1]
            assert tokens == len(routed) * ids.size * (2 if routed else 0)  # two experts a token


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_what_attention_left_is_made_up_for(architecture, tmp_path):
    """With the first half of a layer spoilt, corrected down projections bring its output back towards the original's."""
    checkpoint = open_checkpoint(tiny.build(architecture, tmp_path / "m"))
    rng = np.random.default_rng(0)

    class Spoilt:
        change: dict = {}  # noqa: RUF012

        def read(self, name):
            if name not in self.change and name == "blk.0.attn_output.weight":
                value = checkpoint.read(name)
                self.change[name] = value + 0.2 * value.std() * rng.standard_normal(value.shape).astype(np.float32)
            return self.change.get(name, checkpoint.read(name))

        def read_rows(self, name, start, stop):
            return checkpoint.read_rows(name, start, stop)

    spoilt = Spoilt()
    blocks = sequential.Blocks(checkpoint), sequential.Blocks(checkpoint, spoilt)
    ids = rng.integers(3, 4096, (16, 64)).astype(np.int64)
    states = blocks[0].embed(ids)
    infos = [info for info in checkpoint.tensors.values() if info.layer == 0 and info.role in sequential.STAGES[3]]
    with torch.inference_mode(), blocks[0].layer(0) as one, blocks[1].layer(0) as other:
        sums = {info.name: Sums(info, range(info.experts)) for info in infos}
        with Inputs(*blocks, 0, everything(infos)) as inputs:
            add_up(sums, inputs.of(one, other, states, states))
        wanted = one(states)
        before = (other(states) - wanted).square().mean()
        for info in infos:
            weight = checkpoint.read(info.name).reshape(info.experts, -1, info.columns)
            new = [sums[info.name].target(weight[expert], expert) for expert in range(info.experts)]
            spoilt.change[info.name] = np.stack(new).reshape(info.shape)
        blocks[1].reload(0)
        after = (other(states) - wanted).square().mean()
    assert after < 0.9 * before


def test_tensors_with_one_input_share_their_sums():
    infos = [TensorInfo(f"blk.0.attn_{part}.weight", (8, 16), "F32") for part in "qkv"]
    sums = {info.name: Sums(info) for info in infos}
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    for _ in range(2):
        add_up(sums, [Pairs(info.name, 0, x.view(-1, 16), y.view(-1, 16)) for info in infos])
    assert len({id(entry) for entry in sums.values()}) == 1
    assert sums[infos[2].name].counts[0] == 128


def test_it_comes_closer_and_a_stopped_run_goes_on(planned, tmp_path, monkeypatch):
    checkpoint, stats, plan, text = planned
    whole = sequential.sequential(checkpoint, plan, stats, text, tmp_path / "a", Progress())
    assert whole.after < whole.before
    assert whole.note.startswith("sequential: KLD")
    assert set(whole.given) == set(pipeline.encode_all(checkpoint, plan, stats, tmp_path / "a" / "tensors"))
    model = ProbeModel(checkpoint, probe_windows(checkpoint, text))
    again = model.divergence(pipeline.decode_all(checkpoint, plan, whole.given))
    assert again == pytest.approx(whole.after, rel=1e-5)

    put, count = sequential.Folder.put, []

    def stop(self, name, packed):
        if len(count) == 9:
            raise KeyboardInterrupt
        count.append(name)
        put(self, name, packed)

    monkeypatch.setattr(sequential.Folder, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        sequential.sequential(checkpoint, plan, stats, text, tmp_path / "b", Progress())
    made = []
    monkeypatch.setattr(sequential.Folder, "put", lambda self, name, packed: (made.append(name), put(self, name, packed)))
    rest = sequential.sequential(checkpoint, plan, stats, text, tmp_path / "b", Progress())
    assert not set(made) & set(count)
    assert all(np.array_equal(whole.given[name], rest.given[name]) for name in whole.given)


def test_what_does_not_help_is_not_kept(planned, tmp_path, monkeypatch):
    checkpoint, stats, plan, text = planned
    monkeypatch.setattr(Sums, "target", lambda self, weight, expert: 1.5 * weight)
    found = sequential.sequential(checkpoint, plan, stats, text, tmp_path, Progress())
    assert found.given == {}
    assert found.after > found.before
    assert "did not help" in found.note


def test_models_too_large_to_measure_and_tensors_too_large_for_memory(planned, tmp_path, monkeypatch):
    """Then nothing is measured, and such tensors are encoded as ever, for the same bytes."""
    checkpoint, stats, plan, text = planned
    monkeypatch.setattr(sequential, "PROBE_WEIGHTS", 0)
    monkeypatch.setattr("quantkit.quantizer.sequential_sums.LARGEST_BYTES", 0)
    found = sequential.sequential(checkpoint, plan, stats, replace(text, train=text.train[:4]), tmp_path, Progress())
    assert found.before is None
    assert "every tensor" in found.note
    plain = pipeline.encode_all(checkpoint, plan, stats)
    head = {"output.weight", "token_embd.weight"}
    assert all(np.array_equal(found.given[name], plain[name]) for name in set(plain) - head)


def test_experts_that_do_not_fit_into_memory_together_are_encoded_in_turns(planned, tmp_path, monkeypatch):
    """One, two or all experts at a time give the same bytes."""
    checkpoint, stats, plan, text = planned
    text = replace(text, train=text.train[:16])
    monkeypatch.setattr(sequential, "PROBE_WEIGHTS", 0)
    whole = dict(sequential.sequential(checkpoint, plan, stats, text, tmp_path / "whole", Progress()).given)
    assert any(checkpoint.info(name).experts > 2 for name in whole)
    one = max(
        8 * info.columns**2 + 4 * info.rows // info.experts * info.columns
        for info in map(checkpoint.info, whole)
        if info.experts > 1
    )
    for limit in (one, 2 * one):
        monkeypatch.setattr("quantkit.quantizer.sequential_sums.LARGEST_BYTES", limit)
        assert max(len(expert_ranges(checkpoint.info(name))) for name in whole) > 1
        parts = sequential.sequential(checkpoint, plan, stats, text, tmp_path / str(limit), Progress()).given
        assert all(np.array_equal(parts[name], whole[name]) for name in whole if expert_ranges(checkpoint.info(name)))


def test_a_plan_in_one_format_and_a_head_of_its_own(tiny_folder, tmp_path):
    """Llama's rows are in another order in the file; its head is not the embedding."""
    checkpoint = open_checkpoint(tiny_folder("llama"))
    plan = uniform_plan(checkpoint, "Q4_0", None)
    text = load_calibration(checkpoint, [tiny.EXAMPLES.parent / "text" / "tinystories.txt"], 4096)
    found = sequential.sequential(checkpoint, plan, ActivationStats(), text, tmp_path, Progress())
    assert "output.weight" in sequential.Folder(next(tmp_path.glob("sequential-*")))
    assert found.after < found.before


def test_the_dial(analyzed, tmp_path):
    folder, work, text = analyzed
    given = {"bpw": 3.6, "work": work, "calibration": [text], "tokens": 8192, "effort": 3}
    path, manifest = quantkit.quantize(folder, tmp_path / "a.gguf", **given)
    assert [note.split(":")[0] for note in manifest.notes] == ["sequential"]
    again, _ = quantkit.quantize(folder, tmp_path / "b.gguf", **given)
    assert path.read_bytes() == again.read_bytes()
    assert MomentStore.open(work / "moments") is not None


def test_a_shared_expert_by_itself_still_knows_all_gates(tmp_path):
    """Where the routed experts are too large for memory, what the shared one makes up for is the same."""
    checkpoint = open_checkpoint(tiny.build("qwen2_moe", tmp_path / "m"))
    blocks = [sequential.Blocks(checkpoint) for _ in range(2)]
    states = blocks[0].embed(np.random.default_rng(0).integers(3, 4096, (2, 24)).astype(np.int64))
    infos = [info for info in checkpoint.tensors.values() if info.layer == 0 and info.role in sequential.STAGES[3]]
    shared = next(info.name for info in infos if info.experts == 1)
    found = []
    with torch.inference_mode(), blocks[0].layer(0) as one, blocks[1].layer(0) as other:
        for wanted in (everything(infos), {shared: range(1)}):
            with Inputs(*blocks, 0, wanted) as inputs:
                found += [pair for pair in inputs.of(one, other, states, 1.1 * states) if pair.name == shared]
    assert len(found) == 2
    assert torch.equal(found[0].residual, found[1].residual)
