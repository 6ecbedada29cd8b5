"""Safetensors formats as blocks in memory: the same numbers, models whose layers keep them, loading, saving, quantizing."""

from __future__ import annotations

import folder_tools as tools
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import quantkit
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import FormatError
from quantkit.formats import get_format
from quantkit.formats.compiled import decoder
from quantkit.formats.tensors import get_tensor_format, tensor_formats
from quantkit.formats.tensors.blocks import block_format, packed_format, to_blocks
from quantkit.formats.tensors.parts import Parts
from quantkit.modeling.modules import Packed, QuantExperts, QuantLinear
from quantkit.modeling.skeleton import materialized_model

FORMATS = tensor_formats()
WRITTEN = ["NF4_DQ", "FP4", "W4A16_G32", "W4A16_ASYM", "GPTQ_INT4_ASYM_G32", "AWQ_INT4_G128", "INT8", "FP8", "FP8_CHANNEL", "MXFP4", "NVFP4"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The path of a small model's folder in a format, by architecture."""
    root = tmp_path_factory.mktemp("folders")

    def get(name: str, fmt: str):
        if not (root / name).exists():
            tools.build(name, root / name)
        if not (root / f"{name}-{fmt}").exists():
            tools.write(root / name, fmt, root / f"{name}-{fmt}")
        return root / f"{name}-{fmt}"

    return get


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.sampled_from([96, 128, 192, 384]))
def test_blocks_stand_for_the_same_numbers(fmt, seed, columns):
    """Also by the compiled decoder; packing is undone by unpacking."""
    rng, shape = np.random.default_rng(seed), (128, columns)
    if not fmt.fits(shape):
        return
    weight = (rng.standard_normal(shape) * np.exp(rng.uniform(-3, 3, (128, 1)))).astype(np.float32)
    weight[rng.random(shape) < 0.1] = 0
    tensors = fmt.encode(weight)
    expected, found = fmt.decode(tensors, shape), to_blocks(fmt.parts(tensors, shape))
    if found is None:
        assert fmt.name == "NVFP4" and columns == 96
        return
    made, data = found
    assert data.shape == (128, made.row_bytes(columns))
    assert np.array_equal(made.decode_blocks(made.blocks(data)).reshape(shape), expected)
    values = np.empty((128 * columns // made.elements, made.elements), np.float32)
    decoder(made)(data.reshape(len(values), -1), values)
    assert np.array_equal(values.reshape(shape), expected)
    assert np.array_equal(made.pack(made.unpack(data)).reshape(128, -1), data)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), element=st.sampled_from(["INT4", "UINT4", "INT8", "NF4", "E4M3", "E5M2"]), kind=st.sampled_from(["F32", "F16", "BF16"]))  # fmt: skip
def test_any_bits_of_a_block_decode_alike_in_both_decoders(seed, element, kind):
    fmt, rng = block_format(element, kind, 32), np.random.default_rng(seed)
    raw = rng.integers(0, 256, (9, fmt.block_bytes())).astype(np.uint8)
    values = np.empty((9, 32), np.float32)
    decoder(fmt)(raw, values)
    with np.errstate(all="ignore"):
        assert np.array_equal(values, fmt.decode_blocks(fmt.blocks(raw)), equal_nan=True)


def test_names_say_what_is_in_a_block():
    fmt = packed_format("uint4_f16_128")
    assert fmt is block_format("UINT4", "F16", 128) and fmt.name == "UINT4_F16_128" and fmt.bpw() == 4.25
    assert packed_format("Q4_K") is get_format("Q4_K")
    for unknown in ("UINT4_F16", "UINT3_F16_128"):
        with pytest.raises(FormatError, match="unknown format"):
            packed_format(unknown)
    with pytest.raises(FormatError, match="unknown format"):  # no file can have it
        get_format("UINT4_F16_128")


def test_what_no_block_fits_stays_plain():
    codes, values = np.zeros((4, 48), np.uint8), np.arange(16, dtype=np.float32)

    def parts(groups: int, scale: float = 1.0) -> Parts:
        return Parts("UINT4", codes, values, np.full((4, groups), scale, np.float32), "F16", np.ones((4, groups), np.uint8))

    assert to_blocks(parts(3)) is not None and to_blocks(parts(6)) is None and to_blocks(parts(48)) is None
    assert to_blocks(parts(3, np.nan)) is None


@pytest.mark.parametrize("fmt", WRITTEN)
def test_a_folder_stays_packed(fmt, folders):
    path = folders("llama", fmt)
    model, theirs = quantkit.load(path), tools.logits(materialized_model(open_checkpoint(path)))
    assert torch.allclose(tools.logits(model), theirs, atol=1e-4 * float(theirs.std()), rtol=1e-4)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 7 and not any(isinstance(module, torch.nn.Linear) for module in model.model.modules())
    held = sum(layer.weight.numel() for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert 8 * held / weights <= get_tensor_format(fmt).element_bits + 1
    assert tools.logits(model.to(torch.bfloat16)).std() > 0


def test_experts_of_a_folder_stay_packed_and_transformers_loads_what_was_saved(folders, tmp_path):
    path = folders("qwen3_moe", "AWQ_INT4_G32")
    model, theirs = quantkit.load(path), tools.logits(materialized_model(open_checkpoint(path)))
    assert any(isinstance(module, QuantExperts) for module in model.modules())
    assert torch.allclose(tools.logits(model), theirs, atol=1e-4 * float(theirs.std()), rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(tools.logits(again), tools.logits(model))
    assert "UINT4_F16_32" in repr(again)


@pytest.mark.parametrize("fmt", ["nf4_dq", "W4A16_ASYM_G32", "FP8"])
def test_transformers_quantizes_while_loading(fmt, folders, tmp_path):
    """Layers and experts get the bytes of the folder that quantkit writes in that format."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = tools.build("qwen3_moe", tmp_path / "plain")
    tools.write(plain, fmt, tmp_path / "written")
    model = load(plain, quantization_config=quantkit.QuantkitConfig(format=fmt), dtype=torch.float32)
    direct = quantkit.load(tmp_path / "written")
    for (name, mine), (other, theirs) in zip(packed(model), packed(direct), strict=True):
        assert name == other and mine.formats == theirs.formats
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(tools.logits(load(tmp_path / "saved")), tools.logits(model))


def packed(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Packed)]


def test_a_damaged_folder_is_refused_by_the_tensors_name(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "damaged"
    tools.write(folders("llama", "NF4").parent / "llama", "NF4", path)
    state = load_file(path / "model.safetensors")
    key = next(name for name in state if name.endswith("down_proj.weight.absmax"))
    state[key][3] = float("nan")
    save_file(state, path / "model.safetensors")
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_down\.weight"):
        quantkit.load(path)
