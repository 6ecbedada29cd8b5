"""What changed between two models: tensors, energy, rank."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from quantkit.analysis.difference import difference, differences
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.adapter import write_adapter
from quantkit.cli import main
from quantkit.errors import CheckpointError
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run


def test_energy_and_rank_of_a_known_difference():
    rng = np.random.default_rng(0)
    before = rng.standard_normal((40, 60)).astype(np.float32)
    left, right = np.linalg.qr(rng.standard_normal((40, 3)))[0], np.linalg.qr(rng.standard_normal((60, 3)))[0]
    found = difference("blk.1.attn_q.weight", before, (before + left @ np.diag([3.0, 2.0, 1.0]) @ right.T).astype(np.float32))
    assert found.layer == 1 and found.role == "attn_q" and found.full == 40 and found.rank == 2  # 13 of 14 parts in two
    assert found.top == pytest.approx(9 / 14, rel=1e-3) and found.energy == pytest.approx(14 / np.square(before).sum(), rel=1e-3)
    assert difference("a.weight", before, before.copy()) is None
    assert difference("output_norm.weight", before[0], 2 * before[0]).energy == pytest.approx(1)


def test_an_adapter_moves_what_it_touches(tiny_folder, tmp_path):
    checkpoint = open_checkpoint(tiny_folder("qwen3"))
    path = tmp_path / "base.gguf"
    run(checkpoint, uniform_plan(checkpoint, "F32", None), path)
    rng, shape = np.random.default_rng(1), checkpoint.info("blk.0.ffn_up.weight").shape
    pair = (rng.standard_normal((2, shape[1])).astype(np.float32), rng.standard_normal((shape[0], 2)).astype(np.float32))
    write_adapter(tmp_path / "a.gguf", checkpoint.family.arch, {"blk.0.ffn_up.weight": pair}, dtype="F32")
    said = CliRunner().invoke(main, ["analyze", str(path), "--against", f"{path}+{tmp_path / 'a.gguf'}", "--json"])
    (moved,) = json.loads(said.output)
    assert moved["tensor"] == "blk.0.ffn_up.weight" and moved["rank"] <= 2
    said = CliRunner().invoke(main, ["analyze", str(path), "--against", str(tiny_folder("qwen3"))])
    assert said.exit_code == 0 and "0 of" in said.output
    with pytest.raises(CheckpointError, match="missing"):
        differences(checkpoint, open_checkpoint(tiny_folder("qwen3_moe")))
    other = tiny.build("qwen3", tmp_path / "wide", hidden_size=128)
    with pytest.raises(CheckpointError, match="in qwen3 and"):
        differences(checkpoint, open_checkpoint(other))
