"""Encoders: equal bytes to ggml's C code (without contraction), threads, bad input."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.checkpoint import open_checkpoint
from quantkit.encoders import get_encoder
from quantkit.errors import CalibrationError, FormatError, PlanError
from quantkit.formats import formats, get_format

QUANTIZED = [f.name for f in formats() if f.is_quantized()]
ENCODER = get_encoder("ggml")


@pytest.fixture(scope="module")
def real_weights():
    """Rows of 768 real weights of the shipped models: a multiple of 32 and of 256, odd number of super-blocks."""
    import tiny

    checkpoint = open_checkpoint(tiny.DENSE)
    return np.concatenate([checkpoint.read(f"blk.{i}.ffn_down.weight") for i in range(4)])


def hard_rows(columns: int = 768) -> np.ndarray:
    """Rows with zeros, constants, outliers, tiny numbers, one sign, halves that overflow."""
    rng = np.random.default_rng(5)
    rows = [
        np.zeros(columns), np.full(columns, 0.3), np.full(columns, -0.3), np.abs(rng.standard_normal(columns)),
        -np.abs(rng.standard_normal(columns)), rng.standard_normal(columns) * 1e-4, rng.standard_normal(columns) * 1e3,
        np.where(np.arange(columns) % 97 == 0, 50.0, 0.01) * rng.standard_normal(columns), rng.standard_normal(columns) * 1e-9,
        np.where(np.arange(columns) < 300, 0, 1) * rng.standard_normal(columns), np.tile([1.0, -1.0], columns // 2),
        rng.standard_t(2, columns), np.round(rng.standard_normal(columns) * 4) / 4,
    ]  # fmt: skip
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_equal_ggml(name, weighted, real_weights):
    fmt = get_format(name)
    if fmt.needs_importance and not weighted:
        pytest.skip("ggml refuses it")
    importance = np.random.default_rng(1).gamma(0.5, 2.0, 768).astype(np.float32) if weighted else None
    for x in (real_weights, hard_rows()):
        ours = ENCODER.encode(x, importance, fmt)
        theirs = oracle.encode(oracle.library(), fmt.gguf_id, fmt.row_bytes(768), x, importance)
        assert np.array_equal(ours, theirs), f"{(ours != theirs).any(1).sum()} of {len(x)} rows differ"
        function = f"dequantize_row_{name.lower().replace('_k', '_K')}"
        decoded = oracle.decode(oracle.library(), function, theirs, 768)
        assert np.array_equal(fmt.decode(ours).view(np.uint32), decoded.view(np.uint32))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(QUANTIZED), st.integers(0, 2**32 - 1), st.floats(-6, 3), st.booleans())
def test_bytes_equal_ggml_on_random_rows(name, seed, scale, weighted):
    fmt = get_format(name)
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(3, (3, 256)) * 10.0**scale).astype(np.float32)
    weighted = weighted or fmt.needs_importance
    importance = rng.gamma(0.5, 2.0, 256).astype(np.float32) if weighted else None
    theirs = oracle.encode(oracle.library(), fmt.gguf_id, fmt.row_bytes(256), x, importance)
    assert np.array_equal(ENCODER.encode(x, importance, fmt, threads=1), theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "IQ4_NL", "MXFP4"])
@pytest.mark.parametrize("columns", [32, 96, 544])
def test_short_rows_equal_ggml(name, columns):
    fmt = get_format(name)
    rng = np.random.default_rng(columns)
    x, importance = rng.standard_normal((5, columns)).astype(np.float32), rng.random(columns).astype(np.float32)
    theirs = oracle.encode(oracle.library(), fmt.gguf_id, fmt.row_bytes(columns), x, importance)
    assert np.array_equal(ENCODER.encode(x, importance, fmt), theirs)


def test_threads_do_not_change_the_bytes(real_weights):
    x = np.tile(real_weights, (2, 1))
    fmt = get_format("Q4_K")
    assert np.array_equal(ENCODER.encode(x, None, fmt, threads=1), ENCODER.encode(x, None, fmt, threads=3))


@pytest.mark.parametrize("name", ["Q8_0", "F16", "BF16", "F32", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0"])
def test_encoding_what_was_decoded_changes_nothing(name, real_weights):
    """Idempotent: formats whose scale follows from the largest (or mean) magnitude. The searches are not."""
    fmt = get_format(name)
    once = ENCODER.encode(real_weights, None, fmt)
    assert np.array_equal(ENCODER.encode(fmt.decode(once), None, fmt), once)


# Share of a normal tensor's energy that each format loses with ones as importance.
LOST = {
    "Q8_0": 2.8e-05, "Q6_K": 0.00029, "Q5_1": 0.0011, "Q5_0": 0.0016, "Q5_K": 0.0012, "Q4_1": 0.0047, "IQ4_NL":
    0.0055, "NVFP4": 0.0091, "Q4_0": 0.0065, "Q4_K": 0.0048, "IQ4_XS": 0.0056, "MXFP4": 0.013, "IQ3_S": 0.019, "Q3_K":
    0.02, "IQ3_XXS": 0.034, "Q2_K": 0.07, "IQ2_S": 0.062, "IQ2_XS": 0.09, "Q2_0": 0.51, "IQ2_XXS": 0.12, "TQ2_0":
    0.65, "IQ1_M": 0.2, "TQ1_0": 0.65, "IQ1_S": 0.23, "Q1_0": 0.35,
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_error_on_normal_weights(name):
    fmt = get_format(name)
    x = np.random.default_rng(3).standard_normal((16, 1024)).astype(np.float32)
    back = fmt.decode(ENCODER.encode(x, np.ones(1024, np.float32), fmt))
    lost = float(((back - x) ** 2).sum() / (x**2).sum())
    assert 0.9 * LOST[name] < lost < 1.1 * LOST[name], lost


def test_error_falls_with_bits(real_weights):
    errors = [
        float(((f.decode(ENCODER.encode(real_weights, None, f)) - real_weights) ** 2).mean())
        for f in map(get_format, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.01 * float((real_weights**2).mean())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value):
    x = np.ones((4, 256), np.float32)
    x[2, 17] = value
    with pytest.raises(FormatError, match=r"blk\.0\.w\[2, 17\]"):
        ENCODER.encode(x, None, get_format("Q4_K"), name="blk.0.w")


def test_formats_that_need_importance_say_so():
    x = np.ones((2, 256), np.float32)
    for name in ("IQ2_XXS", "IQ2_XS", "IQ1_S"):
        with pytest.raises(CalibrationError, match=rf"blk\.3\.w cannot become {name}.*quantkit analyze"):
            ENCODER.encode(x, None, get_format(name), name="blk.3.w")


def test_importance_is_checked():
    x = np.ones((2, 256), np.float32)
    with pytest.raises(CalibrationError, match="another model"):
        ENCODER.encode(x, np.ones(128, np.float32), get_format("Q4_K"))
    bad = np.ones(256, np.float32)
    bad[5] = np.nan
    with pytest.raises(CalibrationError, match="column 5"):
        ENCODER.encode(x, bad, get_format("Q4_K"))
    with pytest.raises(PlanError, match="known methods: ggml"):
        get_encoder("magic")
