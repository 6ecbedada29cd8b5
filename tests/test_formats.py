"""Decoding: equal bits to ggml's C code on random bytes, sizes, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import FormatError
from quantkit.formats import Format, format_by_gguf_id, formats, get_format
from quantkit.formats.compiled import decoder
from quantkit.formats.describe import draw, multiplier_cost
from quantkit.formats.layout import Integers, Trits

ROOT = Path(__file__).parent.parent
QUANTIZED = [f for f in formats() if f.is_quantized()]
SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54),
    "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip


def random_rows(fmt: type[Format], rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random valid bytes: every code, with scales that are finite halves (zero and subnormal ones too)."""
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, (rows * blocks, fmt.block_bytes()), dtype=np.uint8).view(fmt.layout).reshape(-1)
    halves = rng.integers(0, 0x7C00, len(records), dtype=np.uint16) | (rng.integers(0, 2, len(records), dtype=np.uint16) << 15)
    halves[::7] = 0
    halves[3::11] = 1  # the smallest subnormal
    halves[4::13] = 0x7BFF  # the largest number
    for name in fmt.layout.names:
        if fmt.layout[name] == np.float16:
            records[name] = rng.permutation(halves).view(np.float16)
    if isinstance(fmt.block_scale, Integers):  # a nibble in each word
        records["scales"] &= 0x0FFF
        fmt.block_scale.pack((halves[:, None] >> (4 * np.arange(4))) & 15, records)
    return records.view(np.uint8).reshape(rows, -1)


def ggml_function(fmt: type[Format]) -> str:
    """Name of ggml's decoder."""
    return f"dequantize_row_{fmt.name.lower().replace('_k', '_K')}"


def test_registry_holds_ggmls_sizes():
    assert {f.name: (f.elements, f.block_bytes()) for f in formats()} == SIZES
    assert all(format_by_gguf_id(f.gguf_id) is f for f in formats())
    assert format_by_gguf_id(9999) is None


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_decode_equals_ggml_to_the_bit(fmt):
    packed = random_rows(fmt, 64, 8, seed=fmt.gguf_id)
    theirs = oracle.decode(oracle.library(), ggml_function(fmt), packed, 8 * fmt.elements)
    plain = fmt.decode_blocks(packed.reshape(-1, fmt.block_bytes()).view(fmt.layout).reshape(-1))
    assert np.array_equal(plain.reshape(theirs.shape).view(np.uint32), theirs.view(np.uint32))
    compiled = np.full((len(packed) * 8, fmt.elements), np.nan, np.float32)
    decoder(fmt)(packed.reshape(-1, fmt.block_bytes()), compiled)
    assert np.array_equal(compiled.reshape(theirs.shape).view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_every_bit_of_a_block_has_one_meaning(fmt):
    """The layout's statement covers each bit of the block exactly once."""
    if isinstance(fmt.codes, Trits):
        pytest.skip("digits in base three do not own bits")
    owners = np.zeros(8 * fmt.block_bytes(), int)
    for part in fmt.integers().values():
        positions = part.positions(fmt.layout)
        assert positions.min() >= 0
        np.add.at(owners, positions.ravel(), 1)
    for name in (fmt.block_scale, fmt.block_minimum):
        if isinstance(name, str):
            owners[8 * fmt.layout.fields[name][1] :][:16] += 1
    assert (owners == 1).all(), np.flatnonzero(owners != 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(QUANTIZED), st.integers(0, 2**32 - 1))
def test_pack_inverts_unpack(fmt, seed):
    blocks = np.random.default_rng(seed).integers(0, 256, (3, fmt.block_bytes()), dtype=np.uint8)
    if isinstance(fmt.codes, Trits):  # 13 of 256 bytes are no five digits: make them valid first
        blocks = fmt.pack(fmt.unpack(blocks))
    assert np.array_equal(fmt.pack(fmt.unpack(blocks)), blocks)


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


def test_a_format_is_drawn_and_its_multiplier_counted():
    drawing = draw(get_format("Q4_K"))
    assert "byte 16–143" in drawing and "bits 0–3 code 0, bits 4–7 code 32" in drawing
    costs = {name: multiplier_cost(get_format(name)) for name in ("F32", "F16", "BF16", "MXFP4", "Q8_0", "TQ1_0")}
    assert costs == {"F32": 537, "F16": 105, "BF16": 57, "MXFP4": 3, "Q8_0": 49, "TQ1_0": 1}


def test_the_page_about_formats_agrees_with_the_code():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "write_formats.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
