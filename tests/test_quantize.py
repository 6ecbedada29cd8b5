"""Writing: streamed bytes, manifest, reuse, restart, and nothing half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from quantkit.analysis.imatrix import read_imatrix
from quantkit.analysis.run import IMATRIX
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.encoders import get_encoder
from quantkit.errors import CheckpointError, FormatError, OutputError, PlanError
from quantkit.planning.plan import Assignment
from quantkit.planning.standard import standard_plan, uniform_plan
from quantkit.quantizer import pipeline
from quantkit.quantizer.manifest import manifest_path, verify


@pytest.fixture
def model(analyzed):
    folder, work, _ = analyzed
    return open_checkpoint(folder), read_imatrix(work / IMATRIX)


def test_streamed_slices_equal_encoding_at_once(model, tmp_path, monkeypatch):
    checkpoint, stats = model
    monkeypatch.setattr(pipeline, "SLICE_WEIGHTS", 4096)
    plan = standard_plan(checkpoint, "Q4_K_M", stats)
    pipeline.run(checkpoint, plan, tmp_path / "x.gguf", stats=stats)
    file = GgufFile(tmp_path / "x.gguf")
    for info in checkpoint.tensors.values():
        fmt = file.entries[info.name].format
        weights = checkpoint.read(info.name).reshape(info.experts, -1, info.columns)
        whole = [get_encoder("ggml").encode(weights[e], stats.importance(info.name, e), fmt) for e in range(info.experts)]
        assert np.array_equal(file.read_packed(info.name, 0, info.rows), np.concatenate(whole)), info.name


def test_manifest_and_verify(model, tmp_path):
    checkpoint, stats = model
    path = tmp_path / "x.gguf"
    manifest = pipeline.run(checkpoint, standard_plan(checkpoint, "Q3_K_M", stats), path, stats=stats)
    assert manifest.file_bytes == path.stat().st_size
    assert set(manifest.tensors) == set(checkpoint.tensors)
    assert json.loads(manifest_path(path).read_text())["quantkit_manifest"] == 1
    result = verify(path)
    assert result.ok and not result.unchecked and len(result.checked) == 2
    raw = bytearray(path.read_bytes())
    file = GgufFile(path)
    raw[file.entries["blk.1.attn_k.weight"].start + 3] ^= 1  # one flipped bit in a tensor
    path.write_bytes(raw)
    result = verify(path)
    assert not result.ok and any("blk.1.attn_k.weight" in line for line in result.wrong)
    manifest_path(path).unlink()
    result = verify(path)
    assert any("blk.1.attn_k.weight" in line for line in result.wrong) and "manifest.json is missing" in result.unchecked[0]


def test_verify_notices_a_changed_header(model, tmp_path):
    checkpoint, _ = model
    path = tmp_path / "x.gguf"
    pipeline.run(checkpoint, uniform_plan(checkpoint, "Q8_0", None), path)
    raw = path.read_bytes().replace(b"general.type", b"general.tyqe")
    path.write_bytes(raw)
    assert any("header" in line for line in verify(path).wrong)


def watch(monkeypatch, real) -> list[str]:
    """Names of the tensors that are really encoded from now on."""
    encoded: list[str] = []

    def encode(self, info, *rest):
        encoded.append(info.name)
        return real(self, info, *rest)

    monkeypatch.setattr(pipeline.Job, "encode", encode)
    return encoded


def test_only_changed_tensors_are_encoded_again(model, tmp_path, monkeypatch):
    checkpoint, stats = model
    encoded = watch(monkeypatch, pipeline.Job.encode)
    plan = standard_plan(checkpoint, "Q4_K_M", stats)
    run = lambda name: pipeline.run(checkpoint, plan, tmp_path / name, stats=stats, cache=tmp_path / "cache")  # noqa: E731
    run("a.gguf")
    first = [n for n in encoded if checkpoint.info(n).quantizable]
    encoded.clear()
    run("b.gguf")
    assert [n for n in encoded if checkpoint.info(n).quantizable] == []
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    plan.tensors["blk.0.attn_q.weight"] = Assignment("Q8_0")
    run("c.gguf")
    assert [n for n in encoded if checkpoint.info(n).quantizable] == ["blk.0.attn_q.weight"]
    assert len(first) > 10
    stats.tensors["blk.1.attn_k.weight"].sum_squares[0, 0] *= 2  # other statistics are other bytes
    encoded.clear()
    run("d.gguf")
    assert [n for n in encoded if checkpoint.info(n).quantizable] == ["blk.1.attn_k.weight"]


def test_an_interrupted_run_leaves_nothing_and_goes_on_from_where_it_was(model, tmp_path, monkeypatch):
    checkpoint, stats = model
    plan = standard_plan(checkpoint, "Q4_K_M", stats)
    real = pipeline.Job.encode

    def stop_in_the_middle(self, info, *rest):
        if info.name == "blk.1.attn_q.weight":
            raise KeyboardInterrupt
        return real(self, info, *rest)

    monkeypatch.setattr(pipeline.Job, "encode", stop_in_the_middle)
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(checkpoint, plan, out / "x.gguf", stats=stats, cache=cache)
    assert list(out.iterdir()) == []
    kept = len(list(cache.glob("*.bin")))
    encoded = watch(monkeypatch, real)
    pipeline.run(checkpoint, plan, out / "x.gguf", stats=stats, cache=cache)
    quantized = [n for n, e in plan.tensors.items() if e.format != "F32"]
    assert kept >= 5 and len({n for n in encoded if n in quantized}) == len(quantized) - kept
    assert verify(out / "x.gguf").ok


def test_a_failing_cache_does_not_stop_a_run(model, tmp_path):
    checkpoint, stats = model
    (tmp_path / "cache").write_text("a file where the folder should be")
    pipeline.run(checkpoint, standard_plan(checkpoint, "Q4_0", stats), tmp_path / "x.gguf", stats=stats, cache=tmp_path / "cache")
    assert verify(tmp_path / "x.gguf").ok


def test_split_files_have_llama_cpps_names_and_load_together(tmp_path):
    checkpoint = open_checkpoint(tiny.DENSE)
    plan = uniform_plan(checkpoint, "BF16", None)
    pipeline.run(checkpoint, plan, tmp_path / "whole.gguf")
    with pytest.raises(PlanError, match="largest tensor"):
        pipeline.run(checkpoint, plan, tmp_path / "x.gguf", split_bytes=100_000)
    pipeline.run(checkpoint, plan, tmp_path / "x.gguf", split_bytes=4_000_000)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert [p.name for p in parts] == [f"x-{i:05d}-of-{len(parts):05d}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) > 2 and all(p.stat().st_size <= 4_000_000 and verify(p).ok for p in parts)
    whole, split = open_checkpoint(tmp_path / "whole.gguf"), open_checkpoint(parts[0])
    assert split.identity == whole.identity and list(split.tensors) == list(whole.tensors)
    llama_cpp = pytest.importorskip("llama_cpp")
    assert llama_cpp.Llama(str(parts[0]), n_ctx=64, verbose=False).n_vocab() == 4096


def test_a_bad_weight_is_named_and_nothing_is_written(tiny_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 7] = float("nan")
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FormatError, match=r"blk\.1\.ffn_down\.weight\[3, 7\] is nan"):
        pipeline.run(checkpoint, uniform_plan(checkpoint, "Q8_0", None), out / "x.gguf")
    assert list(out.iterdir()) == []


def test_outputs_are_protected(model, tmp_path):
    checkpoint, _ = model
    plan = uniform_plan(checkpoint, "F16", None)
    path = tmp_path / "x.gguf"
    path.write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        pipeline.run(checkpoint, plan, path)
    assert path.read_text() == "precious"
    pipeline.run(checkpoint, plan, path, force=True)
    source = open_checkpoint(path)
    with pytest.raises(OutputError, match="the input itself"):
        pipeline.run(source, uniform_plan(source, "Q8_0", None), path, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        pipeline.run(checkpoint, plan, tmp_path / "no" / "x.gguf")


def test_a_quantized_source_is_refused(model, tmp_path):
    checkpoint, _ = model
    pipeline.run(checkpoint, uniform_plan(checkpoint, "Q4_K", None), tmp_path / "q.gguf")
    source = open_checkpoint(tmp_path / "q.gguf")
    with pytest.raises(CheckpointError, match="quantized already"):
        pipeline.run(source, uniform_plan(source, "Q8_0", None), tmp_path / "x.gguf")


def test_a_plan_of_another_model_is_refused(model, tiny_folder, tmp_path):
    checkpoint, _ = model
    other = open_checkpoint(tiny_folder("llama"))
    with pytest.raises(PlanError, match="another model"):
        pipeline.run(checkpoint, uniform_plan(other, "Q8_0", None), tmp_path / "x.gguf")


def test_gguf_and_folder_give_the_same_file(tmp_path):
    """HF folder → Q4_K_M directly, and by way of a BF16 GGUF: the same tensors."""
    checkpoint = open_checkpoint(tiny.DENSE)
    pipeline.run(checkpoint, uniform_plan(checkpoint, "BF16", None), tmp_path / "bf16.gguf")
    middle = open_checkpoint(tmp_path / "bf16.gguf")
    assert middle.identity == checkpoint.identity
    for source, name in ((checkpoint, "a"), (middle, "b")):
        pipeline.run(source, standard_plan(source, "Q4_K_M", None), tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
