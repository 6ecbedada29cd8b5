"""Products for large models: BF16 close to float32, and nothing left changed afterwards; one thread each for ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.fisher import measure_fisher
from quantkit.analysis.moments import MomentWriter, OutputWriter
from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import open_checkpoint
from quantkit.modeling.blocks import Blocks
from quantkit.modeling.products import fast_float32, gram, product
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer.pipeline import run
from quantkit.threads import lone_products, map_threads


@pytest.fixture(scope="module")
def checkpoints(tiny_folder, tmp_path_factory):
    """A mixture of experts as BF16 and as F16 files."""
    source, folder = open_checkpoint(tiny_folder("qwen2_moe")), tmp_path_factory.mktemp("products")
    out = {}
    for fmt in ("BF16", "F16"):
        run(source, uniform_plan(source, fmt, None), folder / f"{fmt}.gguf")
        out[fmt] = open_checkpoint(folder / f"{fmt}.gguf")
    return out


def measured(checkpoint, folder, half):
    ids = np.random.default_rng(0).integers(3, 4096, (4, 64)).astype(np.int64)
    writer = MomentWriter(folder, checkpoint, "key", half)
    seen = calibrate(checkpoint, CalibrationText(ids, ids, ("x",)), Progress(), writer, half)
    outputs = OutputWriter(folder, checkpoint, ids.size, half)
    return seen, measure_fisher(checkpoint, ids, Progress(), full=outputs, half=half)


def test_statistics_in_bfloat16_are_those_of_float32(checkpoints, tmp_path):
    checkpoint = checkpoints["BF16"]
    (exact, fisher), (half, rough) = (measured(checkpoint, tmp_path / str(h), h) for h in (False, True))
    assert set(exact.stats.tensors) == set(half.stats.tensors) and set(fisher.rows) == set(rough.rows)
    for name, entry in exact.stats.tensors.items():
        ours, theirs = half.stats.tensors[name].sum_squares.sum(0), entry.sum_squares.sum(0)
        assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs), name
        if "exps" not in name:  # a token may take another expert
            a, b = (s.stats.moments.get(name).read() for s in (exact, half))
            difference = float(np.linalg.norm(a - b) / np.linalg.norm(a))
            assert 0 < difference < 0.02, name
        assert np.isclose(rough.rows[name].sum(), fisher.rows[name].sum(), rtol=0.2), name


def test_only_matrices_that_are_bfloat16_in_the_file_are_kept_so(checkpoints):
    for fmt, expected in (("BF16", torch.bfloat16), ("F16", torch.float32)):
        blocks = Blocks(checkpoints[fmt], half=True)
        with blocks.layer(0) as layer:
            module = blocks.model.model.layers[0]
            assert module.self_attn.q_proj.weight.dtype == module.mlp.experts.down_proj.dtype == expected
            assert module.input_layernorm.weight.dtype == module.mlp.gate.weight.dtype == torch.float32
            with torch.inference_mode():
                assert layer(torch.randn(1, 8, module.input_layernorm.weight.shape[0])).dtype == torch.float32
        assert not any("forward" in part.__dict__ for part in module.modules())


def test_product_and_gram():
    x, weight, bias = torch.randn(16, 64), torch.randn(32, 64), torch.randn(32)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(product(x, weight, bias), exact)
    rough = product(x, weight.bfloat16(), bias)
    assert rough.dtype == torch.float32 and 0 < float((rough - exact).norm() / exact.norm()) < 0.01
    assert torch.allclose(gram(x, False), x.T @ x)
    assert 0 < float((gram(x, True) - x.T @ x).norm() / (x.T @ x).norm()) < 0.01


def test_fast_float32_ends_with_its_block_and_leaves_exact_products_exact(monkeypatch):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(ValueError), fast_float32(exact=False):
        assert matmul.fp32_precision == "bf16"
        raise ValueError
    assert matmul.fp32_precision == before
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with fast_float32():
        assert matmul.fp32_precision == before
    monkeypatch.undo()
    x, y = torch.randn(200, 256), torch.randn(256, 300)
    with fast_float32():
        product = x @ y
    exact = x.double() @ y.double()
    assert float((product - exact).norm() / exact.norm()) < 2e-6


def test_products_run_on_one_thread_each_while_several_threads_make_them():
    import scipy.linalg  # noqa: F401

    def threads():
        return {lib["num_threads"] for lib in ThreadpoolController().info() if lib["internal_api"] == "openblas"}

    before = threads()
    with lone_products(4):
        assert threads() == {1}
        with lone_products(2):
            assert threads() == {1}
        assert threads() == {1}
    assert threads() == before
    assert map_threads(lambda _: threads(), range(2), threads=2) == [{1}, {1}] and threads() == before
    assert map_threads(lambda _: threads(), range(1), threads=2) == [before]
    with lone_products(1):
        assert threads() == before
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda i: 1 // i, range(2), threads=2)
    assert threads() == before
