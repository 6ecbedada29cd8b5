"""Small floats and codes in words: equal to torch's casts and to the libraries' packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_tools import bits_of, library, same, weights

from quantkit.formats.tensors import words
from quantkit.formats.tensors.minifloat import (
    E2M1,
    E4M3,
    E5M2,
    E8M0_VALUES,
    bfloat16_decode,
    bfloat16_encode,
    e8m0_encode,
)

# ── small floats ──

CASTS = [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]


def around(values: np.ndarray) -> np.ndarray:
    """All finite values, the points halfway between them, and the numbers next to those, of both signs."""
    ascending = np.unique(values[np.isfinite(values)])
    points = np.concatenate([ascending, (ascending[:-1] + ascending[1:]) / 2])
    return np.concatenate([points, np.nextafter(points, np.float32(9e9)), np.nextafter(points, np.float32(-9e9)), -points * 1.5])


@pytest.mark.parametrize("number, dtype", CASTS, ids=["E4M3", "E5M2"])
def test_eight_bit_floats_equal_torchs_casts(number, dtype):
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(number.decode(codes), torch.from_numpy(codes).view(dtype).float().numpy(), equal_nan=True)
    rng = np.random.default_rng(0)
    wide = (rng.standard_normal(300_000) * np.exp(rng.uniform(-20, 12, 300_000))).astype(np.float32)
    x = np.concatenate([around(number.values), wide, np.array([0.0, -0.0, 1e-45, -1e-45, 3e38, np.nan, -np.nan], np.float32)])
    limit = float(number.max)
    theirs = torch.from_numpy(x).clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
    ours = number.encode(x)
    assert same(ours, theirs) and number.encode(x.reshape(1, -1)).shape == (1, x.size)
    assert number.decode(number.encode(np.float32([np.inf, -np.inf]))).tolist() == [limit, -limit]


def test_e2m1_is_the_nearest_number_ties_to_even():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.values.tolist() == values + [-v for v in values]
    x = np.concatenate([around(E2M1.values), np.linspace(-7, 7, 5001).astype(np.float32)])
    for number, code in zip(x, E2M1.encode(x), strict=True):
        distances = [abs(abs(float(number)) - v) for v in values]
        nearest = [i for i in range(8) if distances[i] == min(distances)]
        assert code & 7 == (nearest[0] if len(nearest) == 1 else next(i for i in nearest if i % 2 == 0))
        assert code >> 3 == np.signbit(number)
    casts = library("compressed_tensors.quantization.utils.fp4_utils")
    assert np.array_equal(E2M1.decode(E2M1.encode(x)), casts.cast_to_fp4(torch.from_numpy(x.copy())).numpy())


def test_e8m0_equals_torchs_cast():
    codes = np.arange(255, dtype=np.uint8)
    theirs = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(E8M0_VALUES[:255], theirs) and np.isnan(E8M0_VALUES[255])
    assert same(e8m0_encode(E8M0_VALUES[:255]), codes)
    powers = E8M0_VALUES[1:254]
    x = np.concatenate([powers * np.float32(f) for f in (1, 1.25, 1.4999, 1.5, 1.5001, 1.75, 1.9999)])
    assert same(e8m0_encode(x), torch.from_numpy(x).to(torch.float8_e8m0fnu).view(torch.uint8).numpy())
    assert e8m0_encode(np.float32([0, 1e-45, 3.4e38])).tolist() == [0, 0, 254]
    assert e8m0_encode(np.float32([7.9, 8, 7]), up_from=2, exponent=2).tolist() == [127, 128, 127]
    assert e8m0_encode(np.float32([7.9, 6.9, 7]), up_from=1.75, exponent=2).tolist() == [128, 127, 128]


def test_bfloat16_equals_torchs_cast():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [weights().ravel(), (rng.standard_normal(100_000) * 1e-38).astype(np.float32), np.float32([0, -0.0, 3e38])]
    )
    assert same(bfloat16_encode(x), torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())
    assert same(bfloat16_decode(bfloat16_encode(x)), torch.from_numpy(x).bfloat16().float().numpy())


# ── words ──


@settings(max_examples=80, deadline=None)
@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8]), word=st.sampled_from(["u1", "<i4", "<u8"]), rows=st.integers(1, 3))
def test_packing_is_invertible_and_puts_codes_where_the_order_says(data, bits, word, rows):
    per_word = 8 * np.dtype(word).itemsize // bits
    order = tuple(data.draw(st.permutations(range(per_word))))
    count = data.draw(st.integers(1, 3 * per_word))
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count)), np.uint8)
    codes = codes.reshape(rows, count)
    packed = words.pack(codes, bits, word, order)
    assert packed.dtype == np.dtype(word) and packed.shape == (rows, math.ceil(count / per_word))
    assert same(words.unpack(packed, bits, count, order), codes)
    for row, column in np.ndindex(codes.shape):
        value = int(packed[row, column // per_word])
        assert bits_of(value, bits * order.index(column % per_word), bits) == codes[row, column]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 40))
def test_packing_equals_compressed_tensors(seed, columns):
    helpers = library("compressed_tensors.compressors.pack_quantized.helpers")
    codes = np.random.default_rng(seed).integers(0, 16, (5, columns), dtype=np.uint8)
    signed = torch.from_numpy(codes.astype(np.int8) - 8)
    assert same(words.pack(codes, 4, "<i4"), helpers.pack_to_int32(signed, 4))
    assert same(words.pack(codes.T, 4, "<i4").T, helpers.pack_to_int32(signed, 4, packed_dim=0))


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="code 16 does not fit 4 bits"):
        words.pack(np.array([16], np.uint8), 4, "u1")
    with pytest.raises(ValueError, match="3 bits do not fill"):
        words.pack(np.array([1], np.uint8), 3, "u1")
    with pytest.raises(ValueError, match="no order of 2"):
        words.unpack(np.array([1], np.uint8), 4, 2, (0, 0))
