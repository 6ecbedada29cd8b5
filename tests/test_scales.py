"""Scales that learn: training sees what the file gives, codes stay, gradients are those of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.analysis.activations import fp4
from quantkit.encoders import get_encoder
from quantkit.encoders.parameters import Parameters
from quantkit.errors import FormatError
from quantkit.formats import formats, get_format
from quantkit.kernels import ops
from quantkit.modeling.modules import QuantExperts, QuantLinear
from quantkit.modeling.scales import ScaledExperts, ScaledLinear, Scales, learnable

NAMES = [fmt.name for fmt in formats() if fmt.is_quantized() and learnable(fmt.name)]


def packed(name: str, *shape: int) -> torch.Tensor:
    """Random weights in a format, uint8 (…, bytes of a row)."""
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    fmt = get_format(name)
    rows = get_encoder("ggml").encode(weight.reshape(-1, shape[-1]), np.ones(shape[-1], np.float32), fmt, name="test")
    return torch.from_numpy(rows).reshape(*shape[:-1], -1)


def test_all_formats_but_those_with_digits_can_learn():
    quantized = {fmt.name for fmt in formats() if fmt.is_quantized()}
    assert quantized - set(NAMES) == {"TQ1_0"}


@pytest.mark.parametrize("name", NAMES)
def test_what_training_sees_is_what_the_file_gives(name):
    """Nothing learned: the very bytes. Something learned: the file decodes to what the layer used, with the codes it had."""
    data = packed(name, 6, 512)
    scales = Scales(data, name, name)
    assert np.array_equal(scales.pack(), data.numpy())
    torch.manual_seed(0)
    with torch.no_grad():
        for value in scales.parameters():
            value.mul_(1 + 0.3 * torch.randn_like(value))
    after, fmt = scales.pack(), get_format(name)
    used, before = scales.value().detach().numpy(), fmt.decode(data.numpy())
    assert np.abs(used - fmt.decode(after)).max() <= 2e-6 * np.abs(used).max()
    assert np.abs(used - before).max() > 0.05 * np.abs(before).max()
    old, new = Parameters(data.numpy(), fmt), Parameters(after, fmt)
    assert np.array_equal(old.entries, new.entries) if old.book else np.array_equal(old.values, new.values)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "NVFP4"])
def test_gradients_of_a_layer(name):
    """Of the inputs as with the decoded weight; of a factor: the weight's gradient times what the factor multiplies."""
    torch.manual_seed(0)
    base = QuantLinear(packed(name, 8, 256), name, torch.randn(8))
    layer, x, grad = ScaledLinear(base), torch.randn(5, 256, requires_grad=True), torch.randn(5, 8)
    with torch.no_grad():
        for value in layer.scales.parameters():
            value.mul_(1 + 0.3 * torch.randn_like(value))
    layer(x).backward(grad)
    weight = layer.scales.value().detach().requires_grad_()
    same = x.detach().clone().requires_grad_()
    out = torch.nn.functional.linear(same, weight, base.bias)
    out.backward(grad)
    assert torch.allclose(layer(x), out, atol=1e-5) and torch.allclose(x.grad, same.grad, atol=1e-5)
    scales = layer.scales
    blocks = scales.scale.shape[1]
    without = Parameters(base.weight.numpy(), get_format(name))
    without.block_scale[:] = 0
    floor = torch.from_numpy(get_format(name).decode(without.pack())) if scales.minimum is not None else torch.zeros(8, 256)
    by_block = lambda part: (weight.grad * part).reshape(8, blocks, -1).sum(-1)  # noqa: E731
    assert torch.allclose(scales.scale.grad, by_block(base.dequantized() - floor), atol=1e-4)
    assert scales.minimum is None or torch.allclose(scales.minimum.grad, by_block(floor), atol=1e-4)


def test_experts_with_factors_of_one_are_the_experts():
    torch.manual_seed(0)
    tensors = {"gate_proj": packed("Q4_0", 4, 64, 64), "up_proj": torch.randn(4, 64, 64), "down_proj": packed("Q5_1", 4, 64, 64)}
    base = QuantExperts(tensors, {"gate_proj": "Q4_0", "up_proj": "", "down_proj": "Q5_1"})
    scaled = ScaledExperts(base)
    x, index = torch.randn(9, 64), torch.randint(0, 4, (9, 2))
    weights = torch.rand(9, 2)
    assert torch.allclose(scaled(x, index, weights), base(x, index, weights), atol=1e-4)
    scaled(x, index, weights).square().sum().backward()
    assert {name for name, value in scaled.named_parameters() if value.requires_grad and value.grad is not None} == {
        "scales.gate_proj.scale", "scales.down_proj.scale", "scales.down_proj.minimum",
    }  # fmt: skip
    unused = sorted(set(range(4)) - set(index.flatten().tolist()))
    grad = scaled.scales["gate_proj"].scale.grad.reshape(4, -1)
    assert all(float(grad[expert].abs().max()) == 0 for expert in unused)


def test_norms_learn_in_float32_where_the_model_is_bfloat16(tiny_gguf):
    """A step that bfloat16 would lose is kept, and the model sees it once it is large enough."""
    from quantkit.rl.base import open_base
    from quantkit.rl.plugin_heal import Learned

    base = open_base(tiny_gguf("llama"), torch.bfloat16)
    learned = Learned(base.model, lambda name: "layers.0.input_layernorm" in name)
    (name,) = learned.vectors
    assert learned.vectors[name].dtype == torch.float32 and len(learned.learned) > 1
    with torch.no_grad():
        for _ in range(100):
            learned.vectors[name].add_(1e-4)
    module = base.model.get_submodule(name.rpartition(".")[0])
    assert module.weight.dtype == torch.bfloat16
    assert torch.allclose(learned.vectors[name] - learned.begun[name], torch.full_like(learned.begun[name], 1e-2), rtol=1e-2)
    base.model(torch.tensor([[3, 4, 5]])).logits.float().sum().backward()
    assert learned.vectors[name].grad is not None and float(learned.vectors[name].grad.abs().max()) > 0


def test_experts_round_their_inputs():
    """Every product of the experts sees a rounded input; gate and up are two products then."""
    base = QuantExperts({n: packed("Q4_0", 2, 64, 64) for n in ("gate_proj", "up_proj", "down_proj")},
                        dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "Q4_0"))  # fmt: skip
    x, index, weights = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    exact = base(x, index, weights)
    base.change = lambda value: value.sign()
    gate, up, down = (ops.dequantize(getattr(base, name)[0], "Q4_0", torch.float32) for name in base.formats)
    inside = torch.nn.functional.silu(x.sign() @ gate.T) * (x.sign() @ up.T)
    assert torch.allclose(base(x, index, weights), inside.sign() @ down.T, atol=1e-3)
    assert not torch.allclose(base(x, index, weights), exact, atol=0.1)


def test_fp4_activations_are_nvfp4():
    """Against the format's definition, number by number; a row of other widths is refused."""
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 48)
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    factor = (x.reshape(-1, 16).abs().amax(1) / 6).max() / 448
    for row, group in [(0, 0), (1, 1), (2, 2)]:
        part = x[row, 16 * group : 16 * group + 16]
        scale = (part.abs().max() / 6 / factor).to(torch.float8_e4m3fn).float() * factor
        wanted = torch.stack([v.sign() * scale * steps[(steps - v.abs() / scale).abs().argmin()] for v in part])
        assert torch.allclose(fp4(x)[row, 16 * group : 16 * group + 16], wanted, rtol=1e-5)
    assert torch.equal(fp4(torch.zeros(2, 32)), torch.zeros(2, 32))
    with pytest.raises(FormatError, match="whole groups of 16"):
        fp4(torch.zeros(2, 24))
