"""Formats of several tensors: equal to the bit to the libraries that load them, and to slow textbook readers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensor_tools import FORMATS, FOUR_BIT, SHAPE, as_torch, bits_of, library, same, weights

from quantkit.checkpoint.quantization import COMPRESSORS, PACKED, SCHEMES
from quantkit.formats.tensors import TensorFormat, get_tensor_format

# ── bitsandbytes ──


def bnb_state(q: torch.Tensor, state) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes saves for a weight."""
    return {"weight": q} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("shape", [(128, 256), (7, 100), (3, 33), (1, 1), (5, 64), (40, 512)], ids=str)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bit_tensors_equal_bitsandbytes(name, shape):
    bnb = library("bitsandbytes.functional")
    fmt = get_tensor_format(name)
    w = torch.from_numpy(weights(shape)).bfloat16()
    ours = fmt.encode(w.float().numpy())
    q, state = bnb.quantize_4bit(w, blocksize=64, quant_type=fmt.element, compress_statistics=False)
    if fmt.nested:
        # The mean of the maxima depends on the order of adding: theirs is within that, ours is exact. The rest is
        # compared given our mean.
        offset = state.absmax.double().mean().float()
        theirs = bnb.quantize_4bit(w, blocksize=64, quant_type=fmt.element, compress_statistics=True)[1].offset
        assert abs(theirs - offset) <= 4e-6 * offset
        codes, state2 = bnb.quantize_blockwise(state.absmax - offset, blocksize=256)
        state = bnb.QuantState(codes, state.shape, state.code, 64, fmt.element, torch.bfloat16, offset, state2)
    theirs = bnb_state(q, state)
    assert set(theirs) == set(ours)
    for key, tensor in theirs.items():
        if "quant_state" in key:
            assert ours[key].tobytes().rstrip() == tensor.numpy().tobytes()  # ours has room for any mean
        else:
            assert ours[key].shape == tuple(tensor.shape) and same(ours[key], tensor), key


@pytest.mark.parametrize("name", ["NF4_DQ", "FP4_DQ"])
def test_double_quantization_equals_bitsandbytes_where_the_mean_is_exact(name):
    bnb = library("bitsandbytes.functional")
    fmt = get_tensor_format(name)
    rng = np.random.default_rng(1)
    w = rng.uniform(-0.1, 0.1, (256, 256)).astype(np.float32)
    w[:, ::64] = rng.integers(128, 1024, (256, 4)) / 1024  # maxima whose sums are exact in any order
    theirs = bnb_state(*bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type=fmt.element, compress_statistics=True))
    ours = fmt.encode(w)
    for key, tensor in theirs.items():
        if "quant_state" in key:
            assert json.loads(ours[key].tobytes()) == json.loads(tensor.numpy().tobytes()) | {"dtype": "bfloat16"}
        else:
            assert same(ours[key], tensor), key
    assert same(fmt.decode({k: v.numpy() for k, v in theirs.items()}, w.shape), fmt.decode(ours, w.shape))


@pytest.mark.parametrize("shape", [(128, 256), (7, 100), (40, 512)], ids=str)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bit_decode_equals_bitsandbytes_on_its_own_and_on_any_tensors(name, shape):
    bnb = library("bitsandbytes.functional")
    fmt = get_tensor_format(name)
    rng = np.random.default_rng(2)
    encoded = fmt.encode(weights(shape))
    noise = {
        k: rng.integers(0, 256, v.shape, dtype=np.uint8) if v.dtype == np.uint8 and "state" not in k else v
        for k, v in encoded.items()
    }
    for tensors in (encoded, noise):
        loaded = {k.removeprefix("weight."): v for k, v in as_torch(fmt, tensors, shape).items()}
        q = loaded.pop("weight")
        state = bnb.QuantState.from_dict(loaded, device=torch.device("cpu"))
        decoded = fmt.decode(tensors, shape)
        assert same(bnb.dequantize_4bit(q, state) + 0, torch.from_numpy(decoded).bfloat16() + 0)
        state.dtype = torch.float32
        # + 0: the sign of FP4's second zero differs between bitsandbytes' own kernels
        assert same(bnb.dequantize_4bit(q, state) + 0, torch.from_numpy(decoded) + 0)


def test_four_bit_decode_equals_a_textbook_reader():
    fmt, shape = get_tensor_format("NF4"), (3, 33)
    tensors = fmt.encode(weights(shape))
    out = []
    for i in range(99):
        byte = int(tensors["weight"][i // 2, 0])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        out.append(tensors["weight.quant_map"][code] * tensors["weight.absmax"][i // 64])
    assert same(fmt.decode(tensors, shape), np.array(out, np.float32).reshape(shape))


# ── integers ──


def textbook(fmt: type[TensorFormat], tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """GPTQ and AWQ tensors read one weight and one bit at a time; a word holds codes of inputs, or of outputs."""
    awq, (rows, columns) = fmt.name.startswith("AWQ"), shape
    place = [0, 4, 1, 5, 2, 6, 3, 7] if awq else list(range(8))  # where in a word an output's code lies
    out = np.empty(shape, np.float32)
    for o, i in np.ndindex(rows, columns):
        group = i // fmt.group if awq else int(tensors["g_idx"][i])
        if awq:
            code = bits_of(int(tensors["qweight"][i, o // 8]), 4 * place[o % 8], 4)
        else:
            code = bits_of(int(tensors["qweight"][i // 8, o]), 4 * (i % 8), 4)
        zero = bits_of(int(tensors["qzeros"][group, o // 8]), 4 * place[o % 8], 4) + (0 if awq else 1)
        out[o, i] = np.float32(code - zero) * np.float32(tensors["scales"][group, o])
    return out


TRANSPOSED = [f for f in FORMATS if f.name.startswith(("GPTQ", "AWQ"))]


@pytest.mark.parametrize("fmt", TRANSPOSED, ids=lambda f: f.name)
def test_gptq_and_awq_equal_a_textbook_reader(fmt):
    shape = (16, 2 * fmt.group)
    rng = np.random.default_rng(3)
    encoded = fmt.encode(weights(shape))
    noise = {k: rng.integers(-(2**31), 2**31, v.shape, dtype=np.int32) if v.dtype == np.int32 else v for k, v in encoded.items()}
    noise |= {"g_idx": rng.integers(0, 2, shape[1], dtype=np.int32)} if "g_idx" in noise else {}
    for tensors in (encoded, noise):
        assert same(fmt.decode(tensors, shape), textbook(fmt, tensors, shape))


@pytest.mark.parametrize("fmt", TRANSPOSED, ids=lambda f: f.name)
def test_gptq_and_awq_codes_are_nearest_for_their_stored_scale(fmt):
    w = weights((16, 2 * fmt.group))
    tensors = fmt.encode(w)
    scale = np.repeat(tensors["scales"].T.astype(np.float64), fmt.group, axis=1)
    error = np.abs(fmt.decode(tensors, w.shape) - w)
    clipped = np.abs(fmt.decode(tensors, w.shape)) < np.abs(w)  # the far end may lie beyond the last code
    assert (error <= np.where(clipped, 1.02, 0.5001) * scale).all()
    low, high = (f(w.reshape(16, 2, -1), axis=2).T for f in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if fmt.symmetric:
        low, high = np.minimum(low, -high), np.maximum(-low, high)
    usual = (high > low) & (high - low > 1e-5) & (low < -(high - low) / 30)
    expected = ((high - low).astype(np.float32) / np.float32(15)).astype(np.float16)
    assert usual.sum() >= 20 and same(tensors["scales"][usual], expected[usual])


def test_gptqs_stored_zero_points_are_one_less():
    w = weights((8, 64))
    assert (get_tensor_format("GPTQ_INT4_G32").encode(w)["qzeros"].view(np.uint32) == 0x77777777).all()
    fmt = get_tensor_format("GPTQ_INT4_ASYM_G32")
    w = np.abs(w) + np.float32(0.1)
    tensors = fmt.encode(w)
    assert (tensors["qzeros"] == 0).all()  # used as 1: nothing below zero, and never the ambiguous zero point 0
    assert (np.abs(fmt.decode(tensors, w.shape) - w) <= np.repeat(tensors["scales"].T.astype(np.float64), 32, 1) * 0.502).all()


@pytest.mark.parametrize("name", ["AWQ_INT4_G128", "AWQ_INT4_G32"])
def test_awq_equals_compressed_tensors_converter(name):
    converters = library("compressed_tensors.entrypoints.convert.converters.autoawq")
    fmt, w = get_tensor_format(name), weights()
    tensors = fmt.encode(w)
    converter = converters.AutoAWQConverter(group_size=fmt.group)
    converted = converter.process({f"m.{k}": v for k, v in as_torch(fmt, tensors, w.shape).items()})
    converted = {k.removeprefix("m."): v for k, v in converted.items()}
    converted["weight_scale"] = converted["weight_scale"].float()
    scheme = SCHEMES["W4A16_ASYM"] | {"group_size": fmt.group}
    assert same(decompress(scheme, "pack-quantized", converted), fmt.decode(tensors, w.shape))


# ── compressed-tensors ──


def scheme_of(scheme: dict):
    quantization = library("compressed_tensors.quantization")
    return quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**scheme))


def decompress(scheme: dict, compressor: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """compressed-tensors' own reading of a weight."""
    base = library("compressed_tensors.compressors.base").BaseCompressor
    return base.get_value_from_registry(compressor).decompress(tensors, scheme_of(scheme))["weight"]


def extremes(w: torch.Tensor, scheme: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight under every scale, as compressed-tensors' observers give them."""
    if scheme["strategy"] == "tensor":
        return w.min().reshape(1), w.max().reshape(1)
    grouped = w if scheme["strategy"] == "channel" else w.unflatten(-1, (-1, scheme["group_size"]))
    keep = scheme["strategy"] == "channel"
    return grouped.amin(-1, keepdim=keep), grouped.amax(-1, keepdim=keep)


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_equal_compressed_tensors(name):
    helpers = library("compressed_tensors.quantization.utils.helpers")
    base = library("compressed_tensors.compressors.base").BaseCompressor
    fmt, scheme, w = get_tensor_format(name), scheme_of(SCHEMES[name]), torch.from_numpy(weights())
    low, high = extremes(w, SCHEMES[name])
    state = {"weight": w.clone()}
    divisor = None
    if name == "NVFP4":
        divisor = state["weight_global_scale"] = helpers.generate_gparam(low.min(), high.max())
    scale, zero = helpers.calculate_qparams(low, high, scheme.weights, global_scale=divisor)
    state["weight_scale"] = scale.bfloat16() if "U8" not in fmt.layout(SHAPE)["weight_scale"].dtype and divisor is None else scale
    if not fmt.symmetric:
        zero[(low == 0) & (high == 0)] = 0  # theirs is whatever NaN turns into
        state["weight_zero_point"] = zero
    theirs = base.get_value_from_registry(COMPRESSORS.get(name, PACKED)).compress(state, scheme)
    ours = as_torch(fmt, fmt.encode(w.numpy()), SHAPE)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype and tensor.shape == ours[key].shape and same(ours[key], tensor), key


@pytest.mark.parametrize("name", SCHEMES)
def test_decode_equals_compressed_tensors(name):
    fmt, w = get_tensor_format(name), weights()
    encoded = fmt.encode(w)
    decoded = torch.from_numpy(fmt.decode(encoded, SHAPE))
    tensors = as_torch(fmt, encoded, SHAPE)
    rounded = decompress(SCHEMES[name], COMPRESSORS.get(name, PACKED), tensors)
    assert rounded.dtype == torch.bfloat16 and same(rounded, decoded.bfloat16())
    if tensors["weight_scale"].dtype == torch.bfloat16:  # with scales in float32 it computes in float32
        tensors["weight_scale"] = tensors["weight_scale"].float()
        assert same(decompress(SCHEMES[name], COMPRESSORS.get(name, PACKED), tensors), decoded)
    elif name == "NVFP4":
        forward = library("compressed_tensors.quantization.lifecycle.forward")
        codes = library("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8(
            tensors["weight_packed"], *SHAPE, torch.float32
        )
        scale, divisor = tensors["weight_scale"].float(), tensors["weight_global_scale"]
        assert same(forward.dequantize(codes, scale, None, scheme_of(SCHEMES[name]).weights, torch.float32, divisor), decoded)


@pytest.mark.parametrize("name", SCHEMES)
def test_layout_is_what_compressed_tensors_makes_of_a_bfloat16_module(name):
    initialize = library("compressed_tensors.quantization.lifecycle.initialize").initialize_module_for_quantization
    compress = library("compressed_tensors.compressors.base").compress_module
    fmt = get_tensor_format(name)
    module = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    initialize(module, scheme_of(SCHEMES[name]))
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.fill_(0 if "zero" in key else 1)
    compress(module, COMPRESSORS.get(name, PACKED))
    layout = {k: (v.dtype, tuple(v.shape)) for k, v in as_torch(fmt, fmt.encode(weights()), SHAPE).items()}
    assert {k: (v.dtype, tuple(v.shape)) for k, v in module.state_dict().items()} == layout


# ── floats ──


def test_block_fp8_equals_transformers():
    fp8 = library("transformers.integrations.finegrained_fp8")
    fmt, w = get_tensor_format("FP8_BLOCK"), weights((256, 384))
    w[:128, 128:256] = 0
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))
    theirs = fp8.Fp8Quantize(config)._quantize_one("m.weight", torch.from_numpy(w))
    tensors = fmt.encode(w)
    ours = as_torch(fmt, tensors, w.shape)
    assert {f"m.{k}" for k in ours} == set(theirs)
    assert all(t.dtype == ours[k.removeprefix("m.")].dtype and same(ours[k.removeprefix("m.")], t) for k, t in theirs.items())
    decoded = fp8.Fp8Dequantize(config)._dequantize_one(ours["weight"], ours["weight_scale_inv"], torch.float32)
    assert same(decoded, fmt.decode(tensors, w.shape))


def test_e5m2_formats_equal_torchs_casts():
    w = torch.from_numpy(weights())
    fmt = get_tensor_format("FP8_E5M2")
    tensors = fmt.encode(w.numpy())
    scale = (w.abs().max() / 57344).bfloat16()
    codes = (w / scale.float()).clamp(-57344, 57344).to(torch.float8_e5m2)
    assert same(tensors["weight_scale"], scale.view(torch.uint16).reshape(1).numpy()) and same(tensors["weight"], codes)
    assert same(fmt.decode(tensors, SHAPE), codes.float() * scale.float())

    fmt = get_tensor_format("MXFP8_E5M2")
    tensors = fmt.encode(w.numpy())
    for row, group in np.ndindex(128, 8):
        block = [float(x) for x in w[row, 32 * group : 32 * group + 32]]
        largest = max(map(abs, block))
        exponent = max(math.floor(math.log2(largest)) - 15, -127) if largest else -127
        assert tensors["weight_scale"][row, group] == exponent + 127
        codes = (torch.tensor(block, dtype=torch.float64) * 2.0**-exponent).clamp(-57344, 57344).float()
        assert same(tensors["weight"][row, 32 * group : 32 * group + 32], codes.to(torch.float8_e5m2))


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "MXFP8_E5M2"])
def test_an_mx_scale_of_255_is_nan(name):
    fmt = get_tensor_format(name)
    tensors = fmt.encode(np.ones((1, 64), np.float32))
    tensors["weight_scale"][0, 1] = 255
    decoded = fmt.decode(tensors, (1, 64))
    assert np.isnan(decoded[0, 32:]).all() and (decoded[0, :32] == 1).all()
