"""Error feedback: against the textbook, better in its own metric for every format, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

import quantkit
from quantkit.analysis.moments import MomentStore, column_blocks
from quantkit.analysis.run import MOMENTS
from quantkit.checkpoint import open_checkpoint
from quantkit.encoders import get_encoder
from quantkit.encoders.ldlq import DAMPING, Sweep
from quantkit.encoders.nearest import code_values
from quantkit.encoders.stats import Moments
from quantkit.errors import CalibrationError, PlanError
from quantkit.formats import formats, get_format

LDLQ = get_encoder("ldlq")
SERVED = [f.name for f in formats() if LDLQ.writes(f)]


def correlated(columns: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Moments]:
    """Weights (24, columns), importance and the moments of inputs that are strongly correlated."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns // 4)) @ rng.standard_normal((columns // 4, columns)) / columns
    inputs = rng.standard_normal((4096, columns)) @ (mixing + 0.3 * np.eye(columns)) * rng.gamma(1, 1, columns)
    h = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weight = rng.standard_normal((24, columns)).astype(np.float32)
    return weight, np.diag(h).copy(), Moments(f"test {seed} {columns}", lambda: h[None])


def textbook(weight: np.ndarray, packed: np.ndarray, fmt, h: np.ndarray) -> np.ndarray:
    """GPTQ as in arXiv 2210.17323, one row and one column at a time, in double precision, on the packed scales."""
    h = h.astype(np.float64)
    diagonal = np.diag(h).copy()
    h = h + DAMPING * diagonal.mean() * np.eye(len(h))
    order = np.argsort(-diagonal, kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    blocks = fmt.blocks(packed)
    size = fmt.elements // fmt.groups()
    scale = fmt.block_scales(blocks).reshape(len(weight), -1).astype(np.float64)
    minimum = fmt.block_minimums(blocks).reshape(len(weight), -1).astype(np.float64)
    values = code_values(fmt).astype(np.float64)
    out = np.zeros(weight.shape)
    for r, row in enumerate(weight.astype(np.float64)[:, order]):
        for j, column in enumerate(order):
            s, m = scale[r, column // size], minimum[r, column // size]
            out[r, column] = s * values[np.argmin(np.abs(s * values + m - row[j]))] + m
            error = (row[j] - out[r, column]) / upper[j, j]
            row[j + 1 :] -= error * upper[j, j + 1 :]
    return out


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q4_0", "IQ4_XS", "Q8_0"])
def test_it_is_the_textbooks_sweep(name):
    fmt = get_format(name)
    weight, importance, moments = correlated()
    packed = get_encoder("ggml").encode(weight, importance, fmt)
    ours = fmt.decode(LDLQ.encode(weight, importance, fmt, moments=moments))
    expected = textbook(weight, packed, fmt, moments.read()[0])
    assert (np.abs(ours - expected) > 1e-5).mean() < 0.01  # single precision may turn a tie


@pytest.mark.parametrize("name", SERVED)
def test_outputs_stay_closer_than_with_ggmls_search(name):
    fmt = get_format(name)
    weight, importance, moments = correlated(512)
    h = moments.read()[0].astype(np.float64)

    def lost(method: str) -> float:
        delta = fmt.decode(get_encoder(method).encode(weight, importance, fmt, moments=moments)) - weight
        return float(np.einsum("ij,jk,ik->", delta, h, delta, optimize=True))

    assert lost("ldlq") < 0.8 * lost("ggml")


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "Q4_1"])
def test_scales_are_ggmls_and_threads_change_nothing(name):
    fmt = get_format(name)
    weight, importance, moments = correlated()
    packed = get_encoder("ggml").encode(weight, importance, fmt)
    ours = LDLQ.encode(weight, importance, fmt, moments=moments, threads=1)
    assert np.array_equal(fmt.block_scales(fmt.blocks(ours)), fmt.block_scales(fmt.blocks(packed)))
    assert np.array_equal(ours, LDLQ.encode(weight, importance, fmt, moments=moments, threads=3))
    halves = [LDLQ.encode(weight[i : i + 12], importance, fmt, moments=moments) for i in (0, 12)]
    assert np.array_equal(ours, np.concatenate(halves))
    assert np.array_equal(LDLQ.encode(weight, importance, fmt), packed)  # nothing known: ggml's bytes


def test_long_rows_are_cut_into_diagonal_blocks():
    assert [column_blocks(n) for n in (256, 4096, 8192, 14336, 28672, 96)] == [1, 1, 2, 4, 7, 1]
    weight, importance, moments = correlated(512)
    h = moments.read()[0]
    cut = Moments("cut", lambda: np.stack([h[:256, :256], h[256:, 256:]]))
    fmt = get_format("Q4_K")
    both = fmt.decode(LDLQ.encode(weight, importance, fmt, moments=cut))
    first = fmt.decode(LDLQ.encode(weight[:, :256], importance[:256], fmt, moments=Moments("first", lambda: h[None, :256, :256])))
    assert np.array_equal(both[:, :256], first)


def test_moments_that_do_not_fit_are_refused():
    weight, importance, _ = correlated()
    with pytest.raises(CalibrationError, match="moments cover 128"):
        LDLQ.encode(weight, importance, get_format("Q8_0"), moments=Moments("x", lambda: np.eye(128, dtype=np.float32)[None]))
    bad = -np.eye(256, dtype=np.float32)
    bad[0, 1] = bad[1, 0] = 10
    with pytest.raises(CalibrationError, match="not positive definite"):
        Sweep(bad)


def test_channels_that_never_fire_do_no_harm():
    weight, importance, moments = correlated()
    h = moments.read()[0].copy()
    h[5], h[:, 5] = 0, 0
    back = get_format("Q4_K").decode(
        LDLQ.encode(weight, importance, get_format("Q4_K"), moments=Moments("dead", lambda: h[None]))
    )
    assert np.isfinite(back).all() and np.abs(back - weight).max() < 1


@pytest.mark.slow
def test_a_dynamic_plan_uses_it_and_says_so(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:30000])
    options = {"work": tmp_path / "work", "calibration": [text], "tokens": 4096, "probes": False}
    path, manifest = quantkit.quantize(tiny.DENSE, tmp_path / "a.gguf", "dynamic", bpw=3.5, **options)
    methods = {e["method"] for e in manifest.tensors.values() if get_format(e["format"]).is_quantized()}
    assert "ldlq" in methods
    again, _ = quantkit.quantize(tiny.DENSE, tmp_path / "b.gguf", "dynamic", bpw=3.5, **options)
    assert path.read_bytes() == again.read_bytes()
    checkpoint, store = open_checkpoint(tiny.DENSE), MomentStore.open(tmp_path / "work" / MOMENTS)
    assert store is not None and store.get("blk.0.attn_q.weight").key == store.get("blk.0.attn_v.weight").key
    block = store.get("blk.0.ffn_down.weight").read()
    assert block.shape == (1, 768, 768) == (1, *[checkpoint.info("blk.0.ffn_down.weight").columns] * 2)
    plan = tmp_path / "plan.json"
    plan.write_text((tmp_path / "work" / "plan.json").read_text())
    (tmp_path / "work" / MOMENTS / "index.json").unlink()
    with pytest.raises(PlanError, match="second moments are not there"):
        quantkit.quantize(tiny.DENSE, tmp_path / "c.gguf", str(plan), work=tmp_path / "work")
    assert not (tmp_path / "c.gguf").exists()


def test_effort_1_is_ggmls_search_alone(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:12000])
    sensitivity = quantkit.analyze(tiny.DENSE, work=tmp_path / "work", calibration=[text], tokens=2048, probes=False, effort=1)
    assert {c.method for t in sensitivity.tensors.values() for c in t.formats.values()} <= {"ggml", "nearest"}
    assert not (tmp_path / "work" / MOMENTS).exists()
    assert json.loads((tmp_path / "work" / "analysis.json").read_text())["quantkit_analysis"] == 5
