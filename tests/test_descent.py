"""Descent on codes and scales: against the textbook, lower in its own metric for every format, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from test_ldlq import SERVED, correlated

from quantkit.encoders import get_encoder
from quantkit.encoders.descent import OUTPUT_DAMPING, damped, improve
from quantkit.encoders.ldlq import DAMPING
from quantkit.encoders.parameters import Parameters
from quantkit.encoders.stats import Moments
from quantkit.errors import CalibrationError
from quantkit.formats import formats, get_format


def outputs_of(rows: int, seed: int = 1) -> tuple[np.ndarray, Moments]:
    """Moments of gradients at outputs that hang together."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((512, rows // 3)) @ rng.standard_normal((rows // 3, rows)) + 0.3 * rng.standard_normal((512, rows))
    h = (g.T @ g / len(g)).astype(np.float32)
    return h, Moments(f"outputs {seed} {rows}", lambda: h[None])


def loss(weight: np.ndarray, back: np.ndarray, inner: np.ndarray, outer: np.ndarray | None) -> float:
    """tr(O Δ I Δᵀ) in double precision."""
    delta = (back - weight).astype(np.float64)
    image = delta @ inner.astype(np.float64)
    return float(np.sum((image if outer is None else outer.astype(np.float64) @ image) * delta))


@pytest.mark.parametrize("name", SERVED)
def test_parameters_pack_to_the_bytes_they_came_from(name):
    fmt = get_format(name)
    weight, importance, _ = correlated(512)
    packed = get_encoder("ggml").encode(weight, importance, fmt)
    assert np.array_equal(Parameters(packed, fmt).pack(), packed)


@pytest.mark.parametrize("name", SERVED)
def test_each_method_is_lower_in_its_metric_than_the_one_before(name):
    fmt = get_format(name)
    weight, importance, moments = correlated(512)
    outer, outputs = outputs_of(len(weight))
    inner = damped(moments.read()[0], DAMPING)

    def back(method: str) -> np.ndarray:
        return fmt.decode(get_encoder(method).encode(weight, importance, fmt, moments=moments, outputs=outputs))

    ldlq, search, two_sided = back("ldlq"), back("search"), back("two_sided")
    assert loss(weight, search, inner, None) < loss(weight, ldlq, inner, None)
    outer = damped(outer, OUTPUT_DAMPING)
    assert loss(weight, two_sided, inner, outer) < 0.97 * loss(weight, search, inner, outer)


def textbook(weight: np.ndarray, packed: np.ndarray, fmt, inner: np.ndarray, outer: np.ndarray, sweeps: int) -> np.ndarray:
    """Coordinate descent on the codes, one weight at a time in double precision, the gradient computed anew for each."""
    numbers = Parameters(packed, fmt)
    back = numbers.weight.astype(np.float64)
    blocks, group = fmt.blocks(packed), fmt.elements // fmt.groups()
    scale = fmt.block_scales(blocks).reshape(len(weight), -1).astype(np.float64)
    minimum = fmt.block_minimums(blocks).reshape(len(weight), -1).astype(np.float64)
    inner, outer = inner.astype(np.float64), outer.astype(np.float64)
    for _ in range(sweeps):
        for start in range(0, weight.shape[1], 256):
            for i in range(len(weight)):
                for j in range(start, start + 256):
                    slope = outer[i] @ (back - weight) @ inner[:, j]
                    goal = back[i, j] - slope / (outer[i, i] * inner[j, j])
                    values = scale[i, j // group] * numbers.ladder + minimum[i, j // group]
                    back[i, j] = values[np.argmin(np.abs(values - goal))]
    return back


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_XS", "Q4_0"])
def test_codes_alone_are_the_textbooks_descent(name, monkeypatch):
    import quantkit.encoders.descent as module

    monkeypatch.setattr(module, "SWEEPS", 1)  # the first sweep moves codes only
    fmt = get_format(name)
    weight, importance, moments = correlated(256)
    weight = weight[:12]
    outer, outputs = outputs_of(len(weight))
    start = get_encoder("ldlq").encode(weight, importance, fmt, moments=moments)
    ours = fmt.decode(improve(weight, start, fmt, moments, outputs))
    expected = textbook(weight, start, fmt, damped(moments.read()[0], DAMPING), damped(outer, OUTPUT_DAMPING), 1)
    assert (np.abs(ours - expected) > 1e-5).mean() < 0.02  # single precision may turn a tie, and what follows from it
    metric = damped(moments.read()[0], DAMPING), damped(outer, OUTPUT_DAMPING)
    assert loss(weight, ours, *metric) == pytest.approx(loss(weight, expected.astype(np.float32), *metric), rel=0.01)


def test_blocks_of_rows_and_columns_are_independent():
    fmt = get_format("Q4_K")
    weight, importance, _ = correlated(512)
    inner = [correlated(256, seed)[2].read()[0] for seed in (3, 4)]
    outer = [outputs_of(12, seed)[0] for seed in (5, 6)]
    moments, outputs = Moments("two inputs", lambda: np.stack(inner)), Moments("two outputs", lambda: np.stack(outer))
    whole = get_encoder("two_sided").encode(weight, importance, fmt, moments=moments, outputs=outputs)
    for k in range(2):
        rows = slice(12 * k, 12 * k + 12)
        for c in range(2):
            columns = slice(256 * c, 256 * c + 256)
            alone = get_encoder("two_sided").encode(
                weight[rows, columns], importance[columns], fmt, moments=Moments(f"in {c}", lambda c=c: inner[c][None]),
                outputs=Moments(f"out {k}", lambda k=k: outer[k][None]),
            )  # fmt: skip
            step = fmt.row_bytes(256)
            assert np.array_equal(whole[rows, c * step : (c + 1) * step], alone)


def test_same_input_gives_same_bytes_and_dead_outputs_are_no_trouble():
    fmt = get_format("Q3_K")
    weight, importance, moments = correlated()
    nothing = Moments("dead", lambda: np.zeros((1, len(weight), len(weight)), np.float32))
    first, second = (get_encoder("two_sided").encode(weight, importance, fmt, moments=moments, outputs=nothing) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.isfinite(fmt.decode(first)).all()


def test_moments_of_another_matrix_are_refused():
    weight, importance, moments = correlated()
    with pytest.raises(CalibrationError, match="do not cover blk"):
        get_encoder("two_sided").encode(
            weight, importance, get_format("Q4_K"), moments=moments, outputs=outputs_of(16)[1], name="blk.0.ffn_up.weight"
        )


def test_formats_without_free_codes_are_refused():
    assert not get_encoder("two_sided").writes(get_format("TQ1_0"))
    assert [f.name for f in formats() if f.is_quantized() and not get_encoder("search").writes(f)] == ["TQ1_0"]
