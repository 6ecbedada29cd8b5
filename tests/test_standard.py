"""Standard mixes: the types of llama_model_quantize, and the bytes of the oracle."""

from __future__ import annotations

import ctypes

import numpy as np
import oracle
import pytest
import tiny

from quantkit.analysis.imatrix import read_imatrix, write_imatrix
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_reader import GgufFile
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import PlanError
from quantkit.planning.artifact import FILE_TYPES
from quantkit.planning.standard import BASE, standard_plan, uniform_plan
from quantkit.quantizer.pipeline import run

MODELS = ["dense", "moe", "llama", "qwen2_moe"]


def folder_of(name, tiny_folder):
    return {"dense": tiny.DENSE, "moe": tiny.MOE}.get(name) or tiny_folder(name)


def fake_stats(checkpoint) -> ActivationStats:
    """Deterministic statistics for every layer tensor that llama-imatrix would have."""
    rng = np.random.default_rng(11)
    stats = ActivationStats(datasets=("fake.txt",), chunks=4)
    for info in checkpoint.tensors.values():
        if info.quantizable and info.layer is not None:
            counts = np.full(info.experts, 2048.0, np.float32)
            stats.tensors[info.name] = TensorStats(rng.gamma(0.7, 900.0, (info.experts, info.columns)).astype(np.float32), counts)
    return stats


def llama_quantize(source, target, mix, stats):
    """llama_model_quantize through llama-cpp-python, with our statistics as its imatrix."""
    llama_cpp = pytest.importorskip("llama_cpp") if not oracle.REQUIRED else __import__("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[mix], 2
    keep = []
    if stats is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(stats.tensors) + 1))()
        for slot, (name, entry) in zip(entries, stats.tensors.items(), strict=False):
            mean = (entry.sum_squares / entry.counts[:, None]).astype(np.float32)
            keep.append(mean)
            slot.name, slot.size = name.encode(), mean.size
            slot.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix)) if hasattr(params, "imatrix") else None
        keep.append(entries)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


@pytest.fixture(scope="module")
def sources(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standard")
    out = {}
    for name in MODELS:
        checkpoint = open_checkpoint(folder_of(name, tiny_folder))
        out[name] = (checkpoint, folder / f"{name}.gguf", fake_stats(checkpoint))
        run(checkpoint, uniform_plan(checkpoint, "F32", None), out[name][1])
    return out


@pytest.mark.parametrize("mix", BASE)
@pytest.mark.parametrize("name", MODELS)
def test_types_and_bytes_equal_llama_quantize(name, mix, sources, tmp_path):
    checkpoint, source, stats = sources[name]
    for given in [stats] if mix == "Q2_K_S" else [None, stats]:
        llama_quantize(source, tmp_path / "theirs.gguf", mix, given)
        plan = standard_plan(checkpoint, mix, given)
        run(checkpoint, plan, tmp_path / "ours.gguf", stats=given, force=True)
        ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
        types = {n: e.format.name for n, e in ours.entries.items()}
        assert types == {n: e.format.name for n, e in theirs.entries.items()}
        lib = oracle.library()
        for info in list(checkpoint.tensors.values())[::7]:
            entry = ours.entries[info.name]
            if not entry.format.is_quantized():
                continue
            weights = checkpoint.read(info.name).reshape(info.experts, -1, info.columns)
            expected = [
                oracle.encode(
                    lib,
                    entry.gguf_id,
                    entry.format.row_bytes(info.columns),
                    weights[e],
                    given.importance(info.name, e) if given else None,
                )
                for e in range(info.experts)
            ]
            assert np.array_equal(ours.read_packed(info.name, 0, info.rows), np.concatenate(expected)), info.name


def test_stock_llama_quantize_reads_our_imatrix(sources, tmp_path):
    """The same command as users type, with our imatrix.gguf."""
    import subprocess

    tool = oracle.build_llama.cache_dir() / "runtime" / "llama-quantize"
    if not tool.exists():
        oracle.missing(str(tool))
    checkpoint, source, stats = sources["moe"]
    write_imatrix(tmp_path / "imatrix.gguf", stats)
    assert sorted(read_imatrix(tmp_path / "imatrix.gguf").tensors) == sorted(stats.tensors)
    done = subprocess.run(
        [tool, "--imatrix", tmp_path / "imatrix.gguf", source, tmp_path / "theirs.gguf", "Q3_K_M"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert f"have importance matrix data with {len(stats.tensors)} entries" in done.stdout + done.stderr
    run(checkpoint, standard_plan(checkpoint, "Q3_K_M", stats), tmp_path / "ours.gguf", stats=stats)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
    assert {n: e.format.name for n, e in ours.entries.items()} == {n: e.format.name for n, e in theirs.entries.items()}


def test_a_mix_that_needs_statistics_says_so(sources):
    with pytest.raises(PlanError, match="Q2_K_S needs activation statistics"):
        standard_plan(sources["dense"][0], "Q2_K_S", None)
    with pytest.raises(PlanError, match="known mixes"):
        standard_plan(sources["dense"][0], "Q9_K", None)
