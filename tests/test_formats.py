"""Decoding: equal bits to ggml's C code on random bytes, sizes, errors."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import FormatError
from quantkit.formats import Format, format_by_gguf_id, formats, get_format

QUANTIZED = [f for f in formats() if f.is_quantized()]
SIZES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
         "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_XS": (256, 136), "IQ3_S": (256, 110), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}  # fmt: skip


def random_rows(fmt: type[Format], rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random valid bytes: every code, with scales that are finite halves (zero and subnormal ones too)."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, fmt.block_bytes()), dtype=np.uint8)
    records = data.view(fmt.layout).reshape(-1)
    for name in fmt.layout.names:
        if fmt.layout[name] == np.float16:
            halves = rng.integers(0, 0x7C00, len(records), dtype=np.uint16) | (
                rng.integers(0, 2, len(records), dtype=np.uint16) << 15
            )
            halves[::7] = 0
            halves[3::11] = 1  # the smallest subnormal
            records[name] = halves.view(np.float16)
    return records.view(np.uint8).reshape(rows, -1)


def test_registry_holds_ggmls_sizes():
    assert {f.name: (f.elements, f.block_bytes()) for f in formats()} == SIZES
    assert all(format_by_gguf_id(f.gguf_id) is f for f in formats())
    assert format_by_gguf_id(9999) is None


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_decode_equals_ggml_to_the_bit(fmt):
    packed = random_rows(fmt, 64, 4, seed=fmt.gguf_id)
    ours = fmt.decode(packed)
    theirs = oracle.decode(oracle.library(), f"dequantize_row_{fmt.name.lower().replace('_k', '_K')}", packed, 4 * fmt.elements)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_float_formats_survive_a_round_trip(name):
    fmt = get_format(name)
    values = np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 32).astype(np.float16).astype(np.float32)
    from quantkit.encoders import get_encoder

    packed = get_encoder("ggml").encode(values, None, fmt)
    tolerance = 2**-8 if name == "BF16" else 0
    assert np.abs(fmt.decode(packed) - values).max() <= tolerance * np.abs(values).max()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(formats()), st.binary(min_size=0, max_size=700))
def test_any_bytes_decode_or_are_refused(fmt, raw):
    data = np.frombuffer(raw, np.uint8)
    if len(data) % fmt.block_bytes():
        with pytest.raises(FormatError):
            fmt.decode(data)
    else:
        assert fmt.decode(data).shape == (len(data) // fmt.block_bytes() * fmt.elements,)


def test_a_row_that_does_not_fit_names_those_that_do():
    with pytest.raises(FormatError, match="Q4_0"):
        get_format("Q4_K").row_bytes(96)
    with pytest.raises(FormatError, match=r"unknown format 'Q4_X'.*Q4_"):
        get_format("Q4_X")
