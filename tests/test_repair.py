"""Adapters: the best of their rank in the metric, the best ranks for their bytes, read by both runtimes."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

import quantkit
from quantkit.api import repair
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.adapter import (
    AdaptedCheckpoint,
    adapter_bytes,
    adapter_metadata,
    adapter_specs,
    read_adapter,
    write_adapter,
)
from quantkit.checkpoint.gguf_writer import write_gguf
from quantkit.cli import main
from quantkit.encoders.descent import OUTPUT_DAMPING, damped
from quantkit.encoders.ldlq import DAMPING
from quantkit.encoders.stats import Moments
from quantkit.errors import CheckpointError, PlanError
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer import pipeline
from quantkit.quantizer.repair import Offer, choose, offer_of

RNG = np.random.default_rng(0)


def moments(size: int, blocks: int = 1) -> Moments:
    x = RNG.standard_normal((blocks, 3 * size, size)) @ RNG.standard_normal((size, size))
    value = (x.swapaxes(1, 2) @ x / (3 * size)).astype(np.float32)
    return Moments(f"{size} {blocks}", lambda: value)


def dense(known: Moments, share: float) -> np.ndarray:
    blocks = [damped(block, share).astype(np.float64) for block in known.read()]
    size = len(blocks[0])
    out = np.zeros((size * len(blocks),) * 2)
    for k, block in enumerate(blocks):
        out[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    return out


def test_offers_are_the_best_of_their_rank_and_save_what_they_say():
    """Against any other matrix of the rank, in ½ tr(O Δ I Δᵀ), with diagonal blocks on both sides."""
    inner, outer = moments(24, 2), moments(16, 2)
    missing = RNG.standard_normal((32, 48)).astype(np.float32)
    into, out = dense(inner, DAMPING), dense(outer, OUTPUT_DAMPING)

    def cost(delta):
        return 0.5 * np.trace(out @ delta @ into @ delta.T)

    offer = offer_of(missing, inner, outer)
    assert (np.diff(offer.saved) <= 0).all()
    for rank in (1, 4, 9):
        left = cost(missing - offer.b[:, :rank].astype(np.float64) @ offer.a[:rank])
        assert cost(missing) - left == pytest.approx(offer.saved[:rank].sum(), rel=1e-4)
        u, s, vt = np.linalg.svd(missing)
        assert left < cost(missing - (u[:, :rank] * s[:rank]) @ vt[:rank])
        for _ in range(20):
            b = offer.b[:, :rank] + 0.03 * RNG.standard_normal((32, rank))
            assert left < cost(missing - b @ offer.a[:rank])
    plain = offer_of(missing, None, None)
    assert plain.saved[0] == pytest.approx(0.5 * np.linalg.norm(missing, 2) ** 2, rel=1e-5)


def test_large_matrices_take_the_first_singular_values_only(monkeypatch):
    missing = RNG.standard_normal((130, 120)).astype(np.float32)
    whole = offer_of(missing, None, None)
    monkeypatch.setattr("quantkit.quantizer.repair.WHOLE", 100)
    few = offer_of(missing, None, None)
    np.testing.assert_allclose(few.saved, whole.saved, rtol=1e-6)
    np.testing.assert_allclose(few.b @ few.a, whole.b @ whole.a, atol=1e-4)


def test_ranks_go_where_they_save_most_and_fit():
    def offer(rows, columns, saved):
        return Offer(np.zeros((len(saved), columns), np.float32), np.zeros((rows, len(saved)), np.float32), np.array(saved))

    offers = {"small": offer(32, 32, [3.0, 1.0, 0.1]), "large": offer(320, 320, [20.0, 5.0, 0.1]), "none": offer(32, 32, [0.0])}
    best = 0.0
    for size in range(300, 6000, 37):
        ranks = choose(offers, "llama", size)
        if ranks:
            shapes = {n: (len(offers[n].b), r, offers[n].a.shape[1]) for n, r in ranks.items()}
            assert adapter_bytes("llama", shapes) <= size
        saved = sum(offers[n].saved[:r].sum() for n, r in ranks.items())
        assert saved >= best
        best = saved
    assert choose(offers, "llama", 10**6) == {"small": 3, "large": 3}
    assert choose(offers, "llama", 1000) == {"small": 3} or choose(offers, "llama", 1000)["small"] >= 1


def test_files_are_what_the_gguf_package_reads(tmp_path):
    a, b = RNG.standard_normal((3, 40)).astype(np.float32), RNG.standard_normal((20, 3)).astype(np.float32)
    path = tmp_path / "adapter.gguf"
    write_adapter(path, "qwen3", {"blk.0.attn_q.weight": (a, b)})
    assert path.stat().st_size == adapter_bytes("qwen3", {"blk.0.attn_q.weight": (20, 3, 40)})
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert {t.name: list(t.shape) for t in reader.tensors} == {
        "blk.0.attn_q.weight.lora_a": [40, 3], "blk.0.attn_q.weight.lora_b": [3, 20],
    }  # fmt: skip
    back = read_adapter(path).pairs["blk.0.attn_q.weight"]
    assert np.array_equal(back[0], a.astype(np.float16).astype(np.float32))
    assert np.array_equal(back[1], b.astype(np.float16).astype(np.float32))


@pytest.fixture(scope="module")
def quantized(analyzed, tmp_path_factory):
    """(model folder, a file of it in Q3_K, options that find the analysis)."""
    folder, work, text = analyzed
    path = tmp_path_factory.mktemp("repair") / "q3.gguf"
    checkpoint = open_checkpoint(folder)
    pipeline.run(checkpoint, uniform_plan(checkpoint, "Q3_K", None), path)
    return folder, path, {"work": work, "calibration": [text], "tokens": 8192}


def test_an_adapter_brings_anybodys_file_closer_in_both_runtimes(quantized):
    folder, path, options = quantized
    found = repair(folder, path, "100KB", **options)
    assert found.path == path.with_name("q3-adapter.gguf")
    assert 90_000 < found.file_bytes == found.path.stat().st_size <= 100_000
    assert not any("embd" in name or "exps" in name for name in found.ranks)
    both = f"{path}+{found.path}"
    results = {}
    for runtime in ("torch", "llama"):
        if runtime == "llama":
            pytest.importorskip("llama_cpp")
        report = quantkit.compare(folder, [path, both], [options["calibration"][0]], runtime=runtime, limit=2048)
        plain, repaired = (c.divergence.mean_kld for c in report.candidates)
        assert repaired < 0.9 * plain
        assert report.candidates[1].name == "q3.gguf+q3-adapter.gguf"
        assert report.candidates[1].file_bytes == report.candidates[0].file_bytes + found.file_bytes
        results[runtime] = repaired
    if len(results) == 2:
        assert results["llama"] == pytest.approx(results["torch"], rel=0.1)


def test_an_option_of_quantize_stays_within_the_budget(quantized, tmp_path):
    folder, _, options = quantized
    size = open_checkpoint(folder).n_weights // 2 + 200_000
    path, manifest = quantkit.quantize(folder, tmp_path / "a.gguf", size=str(size), adapter="60KB", **options)
    adapter = tmp_path / "a-adapter.gguf"
    assert path.stat().st_size + adapter.stat().st_size <= size
    assert any("a-adapter.gguf" in note for note in manifest.notes)
    assert json.loads((tmp_path / "a.gguf.manifest.json").read_text())["notes"] == manifest.notes
    AdaptedCheckpoint(open_checkpoint(path), read_adapter(adapter))


def test_what_cannot_be_repaired_says_why(quantized, tmp_path, tiny_folder):
    folder, path, options = quantized
    with pytest.raises(PlanError, match="not even one rank"):
        repair(folder, path, "500B", tmp_path / "x.gguf", **options)
    other = tiny_folder("qwen2_moe")
    file = tmp_path / "deep" / "other.gguf"
    file.parent.mkdir()
    pipeline.run(open_checkpoint(other), uniform_plan(open_checkpoint(other), "Q4_0", None), file)
    with pytest.raises(PlanError, match="not the same model"):
        repair(folder, file, "50KB", tmp_path / "x.gguf", **options)
    with pytest.raises(PlanError, match="effort 3"):
        quantkit.quantize(folder, tmp_path / "y.gguf", adapter="50KB", effort=3, **options)
    with pytest.raises(PlanError, match="its own size"):
        quantkit.quantize(folder, tmp_path / "y.gguf", "Q4_K_M", adapter="50KB", **options)
    assert not list(tmp_path.glob("*.gguf"))
    (tmp_path / "there.gguf").write_bytes(b"x")
    run = CliRunner().invoke(main, ["repair", str(folder), str(path), "--size", "50KB", "-o", str(tmp_path / "there.gguf")])
    assert run.exit_code != 0
    assert "there.gguf" in run.output
    assert (tmp_path / "there.gguf").read_bytes() == b"x"


def test_damaged_and_foreign_adapters(quantized, tmp_path):
    _, path, _ = quantized
    model = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="no LoRA adapter"):
        read_adapter(path)
    one = np.zeros((2, 256), np.float32)
    specs = adapter_specs({"blk.0.attn_q.weight": (256, 2, 256)})[:1]
    with write_gguf(tmp_path / "half.gguf", adapter_metadata("qwen3"), specs) as writer:
        writer.write(specs[0].name, one.astype("<f2").view(np.uint8))
    with pytest.raises(CheckpointError, match="belongs to no pair"):
        read_adapter(tmp_path / "half.gguf")
    write_adapter(tmp_path / "other.gguf", "qwen2moe", {"blk.0.attn_q.weight": (one, np.zeros((7, 2), np.float32))})
    with pytest.raises(CheckpointError, match="does not fit"):
        AdaptedCheckpoint(model, read_adapter(tmp_path / "other.gguf"))
