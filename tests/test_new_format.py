"""A new format is one class: declared here, it is encoded, planned, written to a GGUF and read back."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

import quantkit
from quantkit.checkpoint import open_checkpoint
from quantkit.encoders import default_method, get_encoder
from quantkit.formats import Format, base, get_format
from quantkit.formats.compiled import decoder
from quantkit.formats.layout import Linear, ScaleRule, at, over


@pytest.fixture(scope="module")
def toy():
    """Three bits and a sign of scale: 64 weights, 4 groups, 4-bit scales, codes split over two planes."""

    class TOY3(Format):
        """w = (d·(1 + sc))·(q − 4)."""

        name, gguf_id, elements = "TOY3", 900, 64
        layout = np.dtype([("d", "<f2"), ("scales", "u1", 2), ("low", "u1", 16), ("high", "u1", 8)])
        codes, values = over(at("low", 2, run=16), at("high", 1)), Linear(4)
        scales, scale_rule = at("scales", 4), ScaleRule(offset=1)

    yield TOY3
    del base._REGISTRY["TOY3"], base._BY_GGUF_ID[900]


def test_it_encodes_and_decodes(toy):
    x = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    assert default_method(toy) == "nearest" and toy.bpw() == 3.5
    packed = get_encoder("nearest").encode(x, np.ones(256, np.float32), toy)
    back = toy.decode(packed)
    lost = float(((back - x) ** 2).sum() / (x**2).sum())
    assert 0.01 < lost < 0.04, lost  # Q3_K at 3.44 bits: 0.02
    compiled = np.full((128, 64), np.nan, np.float32)
    decoder(toy)(packed.reshape(-1, toy.block_bytes()), compiled)
    assert np.array_equal(compiled.reshape(back.shape), back)
    assert np.array_equal(toy.pack(toy.unpack(packed)).reshape(packed.shape), packed)


def test_it_is_planned_and_survives_a_file(toy, tmp_path):
    path, manifest = quantkit.quantize(tiny.DENSE, tmp_path / "toy.gguf", "uniform:TOY3", work=tmp_path / "work")
    assert {entry["method"] for entry in manifest.tensors.values() if entry["format"] == "TOY3"} == {"nearest"}
    original, written = open_checkpoint(tiny.DENSE), open_checkpoint(path)
    name = "blk.0.ffn_down.weight"
    expected = toy.decode(get_encoder("nearest").encode(original.read(name), None, toy))
    assert np.array_equal(written.read(name), expected)


def test_the_planner_offers_it(toy):
    from quantkit.analysis.errors import offered_formats

    info = open_checkpoint(tiny.DENSE).info("blk.0.ffn_down.weight")
    assert toy in offered_formats(info)


@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "NVFP4", "TQ2_0"]
)
def test_the_generic_encoder_is_about_as_good_as_ggmls(name):
    fmt = get_format(name)
    x = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    importance = np.random.default_rng(2).gamma(0.5, 2.0, 512).astype(np.float32)

    def lost(method: str) -> float:
        back = fmt.decode(get_encoder(method).encode(x, importance, fmt))
        return float((importance * (back - x) ** 2).sum())

    assert lost("nearest") < 1.1 * lost("ggml")
