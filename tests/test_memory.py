"""--fit: the buffers llama.cpp reports at load."""

from __future__ import annotations

import ctypes
import re

import oracle
import pytest
import tiny

from quantkit.checkpoint import open_checkpoint
from quantkit.errors import PlanError
from quantkit.planning.memory import Run, Shape, compute_bytes, kv_bytes, overhead
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run as write

GGML_TYPES = {"F16": 1, "Q8_0": 8, "Q4_0": 2}
MIB = 1024 * 1024
CALLBACKS: list = []


def reported(path, run: Run) -> dict[str, float]:
    """Bytes by buffer from llama.cpp's own log of loading the model and making a context."""
    try:
        import llama_cpp
    except ImportError:
        oracle.missing("llama-cpp-python")
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level, text, data):
        lines.append(text.decode(errors="replace"))

    CALLBACKS.append(log)  # llama.cpp keeps the pointer
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    try:
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = run.context, 2048, run.micro_batch
        params.type_k = params.type_v = GGML_TYPES[run.kv_type]
        params.flash_attn_type = 1 if run.flash_attention else 0
        params.offload_kqv = False
        context = llama_cpp.llama_init_from_model(model, params)
        assert context
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    finally:
        silent = llama_cpp.llama_log_callback(lambda *a: None)
        CALLBACKS.append(silent)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    out = {"model": 0.0, "KV": 0.0, "compute": 0.0, "output": 0.0}
    for kind, size in re.findall(r"(model|KV|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB", "".join(lines)):
        out[kind] += float(size) * MIB
    assert all(out.values()), "".join(lines)[-2000:]
    return out


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "no flash"])
@pytest.mark.parametrize(("context", "kv"), [(512, "F16"), (8192, "F16"), (4096, "Q8_0"), (4096, "Q4_0")])
@pytest.mark.parametrize("name", ["dense", "moe", "llama", "qwen3_moe"])
def test_prediction_is_within_three_percent(name, context, kv, flash, tiny_folder, tmp_path):
    if kv != "F16" and not flash:
        with pytest.raises(PlanError, match="flash attention"):
            Run(context, kv, flash_attention=False)
        return
    folder = {"dense": tiny.DENSE, "moe": tiny.MOE}.get(name) or tiny_folder(name)
    checkpoint = open_checkpoint(folder)
    if kv != "F16" and Shape.of(checkpoint).head < 32:
        return  # llama.cpp has no quantized cache for heads smaller than a block
    path = tmp_path / "x.gguf"
    write(checkpoint, uniform_plan(checkpoint, "F16", None), path)
    run = Run(context, kv, flash_attention=flash)
    theirs, ours = reported(path, run), overhead(checkpoint, run)
    assert ours.kv_cache == pytest.approx(theirs["KV"], rel=0.03, abs=0.006 * MIB)
    assert ours.compute == pytest.approx(theirs["compute"], rel=0.03, abs=0.006 * MIB)
    assert ours.output == pytest.approx(theirs["output"], rel=0.03, abs=0.006 * MIB)
    total = ours.total + path.stat().st_size
    assert total == pytest.approx(sum(theirs.values()), rel=0.03)


def test_an_8b_model_on_paper():
    """Llama-3-8B at 8192 tokens: 1 GiB of F16 cache; a prompt buffer near 260 MiB (measured by llama.cpp: 282.5 MiB with inputs)."""
    shape = Shape("llama", 32, 4096, 32, 8, 128, 128256, 14336)
    run = Run(8192)
    assert kv_bytes(shape, run) == 1 << 30
    assert 255 * MIB < compute_bytes(shape, run) < 310 * MIB
    assert kv_bytes(shape, Run(8192, "Q8_0")) == (1 << 30) * 34 // 64


def test_unknown_cache_types():
    with pytest.raises(PlanError, match="unknown KV cache type"):
        Run(512, "Q3_K")
