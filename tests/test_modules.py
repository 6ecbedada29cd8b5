"""Models whose weights stay packed: the same function as with decoded weights, state dicts, types, transformers' own loading."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

import quantkit
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import CheckpointError, FormatError, PlanError
from quantkit.formats import get_format
from quantkit.kernels import ops, repack
from quantkit.modeling.modules import Packed, QuantEmbedding, QuantExperts, QuantLinear, QuantMLP
from quantkit.modeling.packed import is_experts, packed_model
from quantkit.modeling.skeleton import materialized_model
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run

IDS = torch.arange(40, 64)[None]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS.to(model.device)).logits.float()


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_a_packed_model_computes_what_the_decoded_one_does(tiny_gguf, name):
    checkpoint = open_checkpoint(tiny_gguf(name))
    model = quantkit.load(tiny_gguf(name))
    theirs = logits(materialized_model(checkpoint))
    assert torch.allclose(logits(model), theirs, atol=1e-4 * float(theirs.std()), rtol=1e-4)
    kinds = [type(module) for module in model.modules() if isinstance(module, Packed)]
    quantized = [info for info in checkpoint.tensors.values() if info.dtype == "Q4_0"]
    held = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    assert held == sum(checkpoint.nbytes(info.name) for info in quantized) > 0
    assert (QuantExperts in kinds) == ("moe" in name) and QuantLinear in kinds and QuantEmbedding in kinds
    bits = model.to(torch.bfloat16)
    assert held == sum(p.numel() for p in bits.parameters() if p.dtype == torch.uint8)
    assert logits(bits).std() > 1 and bits.model.embed_tokens(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama-rope3", "qwen2", "qwen3_moe"])
def test_transformers_loads_saves_and_loads_again(tiny_gguf, name, tmp_path):
    """The path of a GGUF, then the folder that save_pretrained wrote, without our configuration: the same bits."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(tiny_gguf(name)), quantization_config=quantkit.QuantkitConfig())
    assert torch.equal(logits(model), logits(quantkit.load(tiny_gguf(name))))
    out = model.generate(IDS, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS, max_new_tokens=4, do_sample=False), out)
    assert (
        again.hf_quantizer.is_trainable
        and json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["formats"]
    )
    for (key, mine), (other, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other and torch.equal(mine, theirs)
    assert load(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_transformers_quantizes_while_loading(tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tiny.MOE, quantization_config=quantkit.QuantkitConfig(format="Q4_K"), dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts) and isinstance(model.lm_head, torch.nn.Linear)
    checkpoint = open_checkpoint(tiny.MOE)
    path = tmp_path / "q4.gguf"
    run(checkpoint, uniform_plan(checkpoint, "Q4_K", None), path)
    direct = quantkit.load(path)
    assert torch.equal(experts.gate_proj, direct.model.layers[0].mlp.experts.gate_proj)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    with pytest.raises(PlanError, match="names no format"):
        load(tiny.MOE, quantization_config=quantkit.QuantkitConfig())
    with pytest.raises(PlanError, match="no layer of the model fits IQ2_S"):
        load(tiny.build("llama", tmp_path / "narrow"), quantization_config=quantkit.QuantkitConfig(format="IQ2_S"))
    with pytest.raises(PlanError, match="stay as they are"):
        load(str(path), quantization_config=quantkit.QuantkitConfig(format="Q4_K"))
    with pytest.raises(CheckpointError, match="save_pretrained from packed weights"):
        open_checkpoint(tmp_path / "saved")
    with pytest.raises(FormatError, match="F16 does not quantize"):
        quantkit.QuantkitConfig(format="F16")
    plain = load(tiny.MOE, dtype=torch.float32)  # everything else goes on to transformers
    assert not any(isinstance(module, Packed) for module in plain.modules())


def test_experts_of_which_some_are_not_quantized(tiny_folder, tmp_path):
    """A down projection in F16 beside packed gates, and another activation than SiLU."""
    checkpoint = open_checkpoint(tiny_folder("qwen3_moe"))
    plan = uniform_plan(checkpoint, "Q4_0", None)
    plan.tensors = {
        name: replace(entry, format="F16") if "ffn_down_exps" in name else entry for name, entry in plan.tensors.items()
    }
    run(checkpoint, plan, tmp_path / "mixed.gguf")
    model, theirs = quantkit.load(tmp_path / "mixed.gguf"), logits(materialized_model(open_checkpoint(tmp_path / "mixed.gguf")))
    experts = model.model.layers[0].mlp.experts
    assert experts.formats["down_proj"] == "" and "plain" in repr(experts)
    check_compiled(model)
    assert torch.allclose(logits(model), theirs, atol=1e-4 * float(theirs.std()), rtol=1e-4)
    experts.activation = "gelu"
    assert not torch.allclose(logits(model), theirs, atol=1e-2)


def test_gate_and_up_are_one_product_where_nothing_is_lost_by_it(tiny_gguf, monkeypatch):
    """Not with a gradient, a hook, or something in a map's place; the function and the names are transformers' own."""
    model = packed_model(open_checkpoint(tiny_gguf("qwen2_moe")))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantMLP)}
    assert list(layers) and all(name.endswith("shared_expert") for name in layers)
    layer, x, together = next(iter(layers.values())), torch.randn(5, 64), []
    swiglu = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda *arguments: together.append(1) or swiglu(*arguments))
    fused = layer(x)
    expected = layer.down_proj(torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x))
    assert len(together) == 1 and torch.allclose(fused, expected, atol=1e-5)
    seen = []
    hook = layer.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(layer(x), expected, atol=1e-5) and seen == [1]
    hook.remove()
    assert torch.allclose(layer(x.requires_grad_()), expected, atol=1e-5)
    layer.up_proj = torch.nn.Sequential(layer.up_proj)
    assert torch.allclose(layer(x.detach()), expected, atol=1e-5) and len(together) == 1


def test_only_experts_of_a_known_shape_are_packed():
    """Fused linear maps, transposed experts and experts with biases are left alone."""
    module = nn.Module()
    module.gate_up_proj, module.down_proj = nn.Parameter(torch.zeros(4, 64, 32)), nn.Parameter(torch.zeros(4, 32, 32))
    assert is_experts(module)
    module.is_transposed = True
    assert not is_experts(module)
    fused = nn.Module()
    fused.gate_up_proj, fused.down_proj = nn.Linear(32, 64), nn.Linear(32, 32)
    assert not is_experts(fused)
    module.is_transposed, module.gate_up_proj_bias = False, nn.Parameter(torch.zeros(4, 64))
    assert not is_experts(module)


def test_plain_models_are_ordinary_ones():
    model = quantkit.load(tiny.DENSE)
    assert not any(isinstance(module, Packed) for module in model.modules())
    assert torch.allclose(logits(model), logits(materialized_model(open_checkpoint(tiny.DENSE))))
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="cannot be put on cuda"):
            quantkit.load(tiny.DENSE, device="cuda")


def test_a_state_dict_has_the_files_bytes_however_they_lie():
    fmt = get_format("Q6_K")
    raw = torch.randint(0, 256, (8, 2 * fmt.block_bytes()), dtype=torch.uint8)
    layer = QuantLinear(raw.clone(), "Q6_K")
    assert np.array_equal(layer.dequantized().numpy(), fmt.decode(raw.numpy()), equal_nan=True)
    layer.lay_out(lambda name, data: True)
    assert layer.packing("weight") == "Q6_K:planes" and torch.equal(layer.weight, repack.pack(raw, fmt))
    assert torch.equal(layer.state_dict()["weight"], raw)
    layer.load_state_dict(OrderedDict(weight=raw.flip(0)))
    assert layer.packing("weight") == "Q6_K" and torch.equal(layer.weight, raw.flip(0))
    assert "512" in repr(layer) and "Q6_K" in repr(layer)
    with pytest.raises(FormatError, match="no blocks to keep packed"):
        QuantLinear(raw, "F16")


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_repacked_models_compute_the_same_with_a_tied_head_too(tiny_gguf, name):
    """As on a GPU, where bytes lie in planes: the same logits, the file's bytes in the state dict, also after loading it."""
    model = quantkit.load(tiny_gguf(name))
    before, bytes_before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    for module in packed:
        module.lay_out(lambda name, data: True)
    assert all(module.packing("weight") == "Q4_0:planes" for module in packed) and torch.equal(logits(model), before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "qwen2")
    assert all(torch.equal(value, bytes_before[key]) for key, value in model.state_dict().items())
    kept = model.state_dict()
    assert (kept["lm_head.weight"].data_ptr() == kept["model.embed_tokens.weight"].data_ptr()) == (name == "qwen2")
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), before) and torch.equal(logits(copied.to(torch.float32)), before)
    model.lm_head.float()  # puts the bytes back, also those that the embedding shares
    assert torch.equal(logits(model), before)
    model.load_state_dict(bytes_before)
    assert torch.equal(logits(model), before)
    for module in packed:
        module.lay_out(lambda name, data: True)
    assert torch.equal(logits(model.to(torch.float32)), before)


def test_a_layer_compiles_whole_forward_and_backward(tiny_gguf):
    """No graph break in a decoder layer with experts; gradients for what is trained on top, none for the bytes."""
    check_compiled(packed_model(open_checkpoint(tiny_gguf("qwen3_moe"))))


def check_compiled(model) -> None:
    layer = model.model.layers[0]
    rotary = model.model.rotary_emb(torch.zeros(1, 8, 64), torch.arange(8)[None])

    def forward(hidden):
        return layer(hidden, attention_mask=None, position_embeddings=rotary)

    hidden = torch.randn(1, 8, 64, requires_grad=True)
    eager = forward(hidden)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.allclose(compiled, eager, atol=1e-5)
    seed = torch.randn_like(eager)
    mine, theirs = (torch.autograd.grad(out, hidden, seed)[0] for out in (compiled, eager))
    assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))
    assert all(parameter.grad is None for parameter in layer.parameters())
    for module in layer.modules():
        if isinstance(module, Packed):
            module.lay_out(lambda name, data: True)  # as on a GPU
    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(hidden), compiled)


def test_low_rank_weights_are_trained_on_packed_ones(tiny_gguf):
    """A few steps lower the loss and change no byte of the base."""
    model = packed_model(open_checkpoint(tiny_gguf("llama")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = model.lm_head
    down, up = torch.nn.Parameter(torch.randn(4, base.in_features) / 8), torch.nn.Parameter(torch.zeros(base.out_features, 4))
    base.forward = lambda x: ops.linear(x, base.weight, base.packing("weight"), x @ down.T, up)
    optimizer, losses = torch.optim.Adam([down, up], 5e-2), []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(IDS).logits[0, :-1], IDS[0, 1:])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.isfinite(losses).all()
