"""Calibration: block by block gives the moments of the whole model; imatrix files; texts."""

from __future__ import annotations

import subprocess

import numpy as np
import oracle
import pytest
import tiny
import torch

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.imatrix import check_stats, read_imatrix, write_imatrix
from quantkit.analysis.texts import DATA, DEFAULT_MIX, CalibrationText, load_calibration
from quantkit.checkpoint import open_checkpoint
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import CalibrationError
from quantkit.modeling.skeleton import materialized_model
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer.pipeline import run


def windows(count=3, length=64):
    return np.random.default_rng(0).integers(3, 4096, (count, length)).astype(np.int64)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_streamed_moments_equal_those_of_the_whole_model(name, tiny_folder):
    checkpoint = open_checkpoint(tiny_folder(name))
    ids = windows()
    streamed = calibrate(checkpoint, CalibrationText(ids, ids, ("x",)), Progress()).stats
    model = materialized_model(checkpoint)
    sums: dict[str, torch.Tensor] = {}

    def hook(tensor):
        def add(module, inputs, output):
            sums[tensor] = sums.get(tensor, 0) + inputs[0].reshape(-1, inputs[0].shape[-1]).double().square().sum(0)

        return add

    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(checkpoint.family.to_gguf(f"{module_name}.weight")[0]))
    with torch.inference_mode():
        model(torch.from_numpy(ids))
    assert set(sums) == set(streamed.tensors)
    for tensor, expected in sums.items():
        entry = streamed.tensors[tensor]
        assert entry.counts.tolist() == [ids.size]
        np.testing.assert_allclose(entry.sum_squares[0], expected.numpy(), rtol=2e-4)


def test_experts_are_counted_by_their_traffic(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder("qwen2_moe"))
    ids = windows()
    stats = calibrate(checkpoint, CalibrationText(ids, ids, ("x",)), Progress()).stats
    for layer in range(2):
        for part in ("gate", "up", "down"):
            entry = stats.tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert entry.counts.sum() == ids.size * 2  # two experts for each token
        assert stats.tensors[f"blk.{layer}.ffn_up_shexp.weight"].counts.tolist() == [ids.size]


def test_an_expert_without_statistics_is_listed_and_not_weighted_with_ones():
    entry = TensorStats(np.ones((3, 2), np.float32), np.array([2, 0, 0], np.float32))
    assert entry.uncovered == [1, 2] and entry.importance(1) is None and entry.importance().tolist() == [0.5, 0.5]
    entry.sum_squares[1:] = 0
    entry.borrowed_squares = np.array([[0, 0], [6, 3], [0, 0]], np.float32)
    entry.borrowed = np.array([0, 3, 0], np.float32)
    assert entry.uncovered == [2] and entry.importance(1).tolist() == [2, 1] and entry.importance().tolist() == [0.5, 0.5]
    assert entry.routed().uncovered == [1, 2] and entry.routed().tobytes() != entry.tobytes()
    stats = ActivationStats({"a": entry})
    assert stats.importance("a", 1) is not None and stats.routed().importance("a", 1) is None
    assert stats.tensors["a"].borrowed is not None  # a copy


def test_llama_imatrix_agrees_with_ours(tmp_path):
    """The same text through llama-imatrix gives the same importance, up to its windows."""
    tool = oracle.build_llama.cache_dir() / "runtime" / "llama-imatrix"
    if not tool.exists():
        oracle.missing(str(tool))
    checkpoint = open_checkpoint(tiny.MOE)
    text = tmp_path / "text.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:25000])
    run(checkpoint, uniform_plan(checkpoint, "F32", None), tmp_path / "f32.gguf")
    subprocess.run(
        [tool, "-m", tmp_path / "f32.gguf", "-f", text, "-o", tmp_path / "i.gguf", "-c", "512"], check=True, capture_output=True
    )
    theirs = read_imatrix(tmp_path / "i.gguf")
    check_stats(theirs, checkpoint)
    ids = load_calibration(checkpoint, [text], 1 << 20)
    ids = CalibrationText(np.concatenate([ids.train, ids.dev]), ids.dev, ("x",))
    ours = calibrate(checkpoint, ids, Progress()).stats
    compared = 0
    for name, entry in theirs.tensors.items():
        if name not in ours.tensors:
            continue  # the router: llama-imatrix has it, it is never quantized
        for expert in range(len(entry.counts)):
            if entry.counts[expert] > 1000:
                a, b = entry.importance(expert), ours.importance(name, expert)
                # a rare outlier may fall into one's windows and not the other's: look at the typical channel
                assert np.median(np.abs(np.log(a / b))) < 0.15, name
                compared += 1
    assert compared > 40


def test_imatrix_of_another_model_is_refused(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder("llama"))
    stats = ActivationStats(tensors={"blk.0.attn_q.weight": TensorStats(np.ones((1, 99), np.float32), np.ones(1, np.float32))})
    with pytest.raises(CalibrationError, match="99"):
        check_stats(stats, checkpoint)
    with pytest.raises(CalibrationError, match="another model"):
        check_stats(ActivationStats(tensors={"x": TensorStats(np.ones((1, 9)), np.ones(1))}), checkpoint)
    foreign = ActivationStats(tensors={}, identity="0" * 16)
    with pytest.raises(CalibrationError, match="another model"):
        check_stats(foreign, checkpoint)


def test_damaged_imatrix_files(tmp_path):
    path = tmp_path / "i.gguf"
    stats = ActivationStats(tensors={"a": TensorStats(np.array([[1, np.nan]], np.float32), np.ones(1, np.float32))})
    write_imatrix(path, stats)
    with pytest.raises(CalibrationError, match="not finite"):
        read_imatrix(path)
    path.write_bytes(b"\x05\x00\x00\x00legacy")
    with pytest.raises(CalibrationError, match="old .dat format"):
        read_imatrix(path)
    with pytest.raises(CalibrationError, match="cannot read"):
        read_imatrix(tmp_path / "missing")


def test_texts(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder("llama"))
    for content, words in (("", "no text"), ("  \n", "no text"), ("short", "fewer than")):
        path = tmp_path / "t.txt"
        path.write_text(content)
        with pytest.raises(CalibrationError, match=words):
            load_calibration(checkpoint, [path], 4096)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_calibration(checkpoint, [tmp_path / "b.txt"], 4096)
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(CalibrationError, match=r"c\.jsonl:1"):
        load_calibration(checkpoint, [tmp_path / "c.jsonl"], 4096)


def test_the_default_mix_is_there_and_split(tiny_folder):
    text = load_calibration(open_checkpoint(tiny_folder("llama")), None, 20000)
    assert text.names == DEFAULT_MIX and all((DATA / name).exists() for name in DEFAULT_MIX)
    assert len(text.train) >= 3 * len(text.dev) > 0
    assert not {row.tobytes() for row in text.train} & {row.tobytes() for row in text.dev}
