"""Quantized activations and KV cache: the arithmetic, and what analyze makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from quantkit.analysis.activations import QuantizedCache, blocks, fp8, int8
from quantkit.analysis.schemes import SCHEMES, measure_schemes
from quantkit.checkpoint import open_checkpoint
from quantkit.encoders import get_encoder
from quantkit.errors import FormatError
from quantkit.formats import get_format
from quantkit.modeling.text import TextEncoder
from quantkit.progress import Progress


@pytest.fixture
def x():
    return torch.from_numpy(np.random.default_rng(0).standard_t(4, (2, 3, 64)).astype(np.float32))


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_int8_is_nearest_and_a_token_has_its_own_scale(x, per):
    top = x.abs().amax(-1, keepdim=True) if per == "token" else x.abs().max()
    error = (int8(x, per) - x).abs()
    assert (error <= top / 127 / 2 * 1.0001).all()
    assert (error.max() > top.min() / 127 / 4).all()  # it does round
    if per == "token":
        louder = x.clone()
        louder[0, 0] *= 1000
        assert torch.equal(int8(louder)[1], int8(x)[1])


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_fp8_keeps_three_bits_of_mantissa(x, per):
    large = x.abs() > 0.05 * x.abs().max()
    relative = ((fp8(x, per) - x).abs() / x.abs())[large]
    assert relative.max() <= 2**-4 * 1.0001 and relative.max() > 2**-6


def test_zeros_stay_zeros():
    for function in (int8, fp8):
        assert torch.equal(function(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_the_cache_is_what_ggml_would_keep(x, name):
    fmt = get_format(name)
    expected = fmt.decode(get_encoder("ggml").encode(x.reshape(-1, 64).numpy(), None, fmt)).reshape(x.shape)
    keys, values = QuantizedCache(name).update(x, 2 * x, 0)
    assert np.array_equal(keys.numpy(), expected) and np.array_equal(values.numpy(), 2 * expected)


def test_a_head_that_no_block_fits_is_refused():
    with pytest.raises(FormatError, match="not a multiple"):
        blocks(torch.ones(1, 1, 2, 48), "Q8_0")


@pytest.mark.parametrize("model", [tiny.DENSE, tiny.MOE], ids=["dense", "moe"])
def test_schemes_are_ranked_as_they_must_be(model):
    checkpoint = open_checkpoint(model)
    text = (tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:6000]
    windows = np.array(TextEncoder(checkpoint).windows(text, 256)[:3])
    costs = {c["name"]: c["kld"] for c in measure_schemes(checkpoint, windows, Progress())}
    assert set(costs) == {s.name for s in SCHEMES}
    assert 0 < costs["KV cache Q8_0"] < costs["KV cache Q4_0"]
    assert 0 < costs["A8 per token"] < costs["A8 per tensor"]
    assert costs["A8 per token"] < costs["W8A8"] < costs["FP8"] < costs["W4A8"] < 0.5
