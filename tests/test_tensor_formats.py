"""Formats of several tensors: what they say of themselves, how large their errors are, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_tools import FORMATS, NAMES, SHAPE, same, weights

from quantkit.errors import FormatError
from quantkit.formats.tensors import get_tensor_format

# Bytes of a weight of 4096 × 4096.
SIZES = {
    "NF4": 8388608 + 4 * 262144 + 64 + 82, "NF4_DQ": 8388608 + 262144 + 4 * 1024 + 64 + 1024 + 177,
    "FP4": 8388608 + 4 * 262144 + 64 + 82, "FP4_DQ": 8388608 + 262144 + 4 * 1024 + 64 + 1024 + 177,
    "INT8": 16777216 + 8192, "W4A16": 8388608 + 262144 + 16, "W4A16_G32": 8388608 + 1048576 + 16,
    "W4A16_ASYM": 8388608 + 262144 + 65536 + 16, "W4A16_ASYM_G32": 8388608 + 1048576 + 262144 + 16,
    "GPTQ_INT4_G128": 8388608 + 262144 + 65536 + 16384, "GPTQ_INT4_G32": 8388608 + 1048576 + 262144 + 16384,
    "GPTQ_INT4_ASYM_G128": 8388608 + 262144 + 65536 + 16384, "GPTQ_INT4_ASYM_G32": 8388608 + 1048576 + 262144 + 16384,
    "AWQ_INT4_G128": 8388608 + 262144 + 65536, "AWQ_INT4_G32": 8388608 + 1048576 + 262144,
    "FP8": 16777216 + 2, "FP8_CHANNEL": 16777216 + 8192, "FP8_E5M2": 16777216 + 2, "FP8_BLOCK": 16777216 + 4 * 1024,
    "MXFP4": 8388608 + 524288, "MXFP8": 16777216 + 524288, "MXFP8_E5M2": 16777216 + 524288, "NVFP4": 8388608 + 1048576 + 4,
}  # fmt: skip

# Largest error of a weight over the largest weight under its scale: half the widest step, and what is clipped.
ERROR = {
    "NF4": 0.153, "NF4_DQ": 0.153, "FP4": 0.168, "FP4_DQ": 0.168, "INT8": 0.0079, "FP8": 0.0646, "FP8_CHANNEL": 0.0646,
    "FP8_BLOCK": 0.0626, "FP8_E5M2": 0.127, "MXFP4": 0.2, "MXFP8": 0.0626, "MXFP8_E5M2": 0.126, "NVFP4": 0.2,
    "W4A16": 0.071, "W4A16_G32": 0.071, "GPTQ_INT4_G128": 0.068, "GPTQ_INT4_G32": 0.068,
    "W4A16_ASYM": 0.14, "W4A16_ASYM_G32": 0.14, "GPTQ_INT4_ASYM_G128": 0.14, "GPTQ_INT4_ASYM_G32": 0.14,
    "AWQ_INT4_G128": 0.14, "AWQ_INT4_G32": 0.14,
}  # fmt: skip


# ── registry, layout, sizes ──


def test_registry_holds_every_format_and_says_what_it_is():
    assert {f.name: f.nbytes((4096, 4096)) for f in FORMATS} == SIZES
    for fmt in FORMATS:
        assert get_tensor_format(fmt.name.lower()) is fmt
        assert fmt.source and fmt.element and fmt.containers == ("safetensors",) and fmt.__doc__
        assert fmt.bpw((4096, 4096)) == 8 * SIZES[fmt.name] / 4096**2
    with pytest.raises(FormatError, match="did you mean NF4"):
        get_tensor_format("NF3")


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_encode_gives_what_layout_says_and_leaves_its_input_alone(fmt):
    w = weights()
    before = w.copy()
    tensors = fmt.encode(w)
    layout = fmt.layout(w.shape)
    assert {k: (v.dtype, v.shape) for k, v in tensors.items()} == {k: (v.numpy(), v.shape) for k, v in layout.items()}
    assert sum(v.nbytes for v in tensors.values()) == fmt.nbytes(w.shape)
    assert all(v.flags.c_contiguous for v in tensors.values())
    assert same(w, before)
    kept = {k: v.copy() for k, v in tensors.items()}
    decoded = fmt.decode(tensors, w.shape)
    assert decoded.dtype == np.float32 and decoded.shape == w.shape
    assert all(same(kept[k], tensors[k]) for k in kept)
    assert all(np.shares_memory(decoded, v) is False for v in tensors.values())
    again = fmt.encode(w)
    assert all(same(again[k], kept[k]) for k in kept)


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-3, 3))
def test_the_error_of_a_weight_is_bounded(fmt, seed, size):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((128, 128)) * np.exp(rng.uniform(-3, 3, (128, 1))) * 10**size).astype(np.float32)
    w[rng.random(w.shape) < 0.3] = 0
    error = np.abs(fmt.decode(fmt.encode(w), w.shape).astype(np.float64) - w)
    if fmt.name in ("FP8", "FP8_E5M2", "FP8_BLOCK"):
        largest = np.abs(w).max()
    else:
        largest = np.repeat(np.abs(w).reshape(128, -1, fmt.group or 128).max(2), fmt.group or 128, axis=1)
    bound = ERROR[fmt.name] * largest
    if fmt.name.endswith("_DQ"):  # the maxima are rounded too
        bound = bound + 0.02 * np.abs(w).max()
    if fmt.name.startswith(("GPTQ", "AWQ")):  # scales below half precision's normal numbers
        bound = bound + 8 * 2.0**-24
    if fmt.name == "NVFP4":  # scales below E4M3's normal numbers
        bound = bound + 6 * 2.0**-6 / 2688 * np.abs(w).max()
    assert (error <= bound).all(), (error / np.maximum(bound, 1e-30)).max()


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bits_decode(fmt, seed):
    rng = np.random.default_rng(seed)
    encoded = fmt.encode(np.ones(SHAPE, np.float32))
    meaningful = ("quant_state", "weight_shape", "g_idx")  # checked below: anything else there is refused
    tensors = {
        k: v if any(m in k for m in meaningful) else np.frombuffer(rng.bytes(v.nbytes), v.dtype).reshape(v.shape)
        for k, v in encoded.items()
    }
    assert fmt.decode(tensors, SHAPE).shape == SHAPE


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80))
def test_a_damaged_quant_state_is_refused(data):
    for name in ("NF4", "FP4_DQ"):
        fmt = get_tensor_format(name)
        tensors = fmt.encode(np.ones((8, 64), np.float32))
        state = next(k for k in tensors if "quant_state" in k)
        with pytest.raises(FormatError, match="quant_state"):
            fmt.decode({**tensors, state: np.frombuffer(data, np.uint8)}, (8, 64))


# ── what is refused ──


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_weights_that_are_not_finite_are_refused_by_index(fmt):
    for value in (np.nan, np.inf, -np.inf):
        w = weights()
        w[7, 31] = value
        with pytest.raises(FormatError, match=r"weight\[7, 31\]"):
            fmt.encode(w)


def test_shapes_that_do_not_fit_name_what_does():
    assert not get_tensor_format("W4A16").fits((8, 96)) and get_tensor_format("W4A16_G32").fits((8, 96))
    with pytest.raises(FormatError, match=r"W4A16 .*\(8, 96\).* 96 .*group of 128; group sizes that fit: 16, 32.*W4A16_G32"):
        get_tensor_format("W4A16").encode(np.zeros((8, 96), np.float32))
    with pytest.raises(FormatError, match="12 rows are not a multiple of the 8 zero points"):
        get_tensor_format("AWQ_INT4_G32").nbytes((12, 64))
    with pytest.raises(FormatError, match="64 rows are not a multiple of the block of 128"):
        get_tensor_format("FP8_BLOCK").layout((64, 128))
    for fmt in FORMATS:
        assert not fmt.fits((2, 128, 128)) and not fmt.fits((0, 128)) and not fmt.fits((128,))


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_missing_and_misshapen_tensors_are_refused_by_name(fmt):
    tensors = fmt.encode(weights())
    for name, tensor in tensors.items():
        with pytest.raises(FormatError, match=f"needs the tensor '{name}'"):
            fmt.decode({k: v for k, v in tensors.items() if k != name}, SHAPE)
        with pytest.raises(FormatError, match=f"tensor '{name}' is"):
            fmt.decode({**tensors, name: tensor[None]}, SHAPE)
        with pytest.raises(FormatError, match=f"tensor '{name}' is"):
            fmt.decode({**tensors, name: tensor.astype(np.float64)}, SHAPE)


def test_contradictory_tensors_are_refused():
    gptq, packed, nf4 = (get_tensor_format(n) for n in ("GPTQ_INT4_G32", "W4A16_G32", "NF4_DQ"))
    w = weights((8, 64))
    tensors = gptq.encode(w)
    with pytest.raises(FormatError, match="'g_idx' names group 2 of 2"):
        gptq.decode({**tensors, "g_idx": np.full(64, 2, np.int32)}, w.shape)
    with pytest.raises(FormatError, match="weight_shape"):
        packed.decode({**packed.encode(w), "weight_shape": np.array([8, 63])}, w.shape)
    with pytest.raises(FormatError, match=r"\[64, 8\]"):
        nf4.decode(nf4.encode(np.ascontiguousarray(w.T)), w.shape)


@pytest.mark.parametrize("name", ["GPTQ_INT4_G32", "GPTQ_INT4_ASYM_G32", "AWQ_INT4_G32"])
def test_scales_beyond_half_precision_are_refused_and_tiny_ones_kept(name):
    fmt = get_tensor_format(name)
    w = weights((8, 64))
    w[6, 40] = 3e6
    with pytest.raises(FormatError, match=r"group \[6, 1\] are too large for a scale in float16"):
        fmt.encode(w)
    assert np.abs(fmt.decode(fmt.encode(w * np.float32(1e-12)), w.shape)).max() < 1e-5


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e30, 2e38])
def test_weights_at_the_ends_of_float32_decode_to_finite_ones_or_are_refused(fmt, size):
    w = np.random.default_rng(5).uniform(-1, 1, SHAPE) * size
    w[1] = 0
    w = w.astype(np.float32)
    try:
        decoded = fmt.decode(fmt.encode(w), SHAPE)
    except FormatError as error:
        assert size >= 1e30 and "too large for a scale" in str(error)
    else:
        assert np.isfinite(decoded).all() and (np.abs(decoded) <= 1.2 * np.abs(w).max() + 1e-5).all()
