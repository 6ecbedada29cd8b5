"""The operators of torch: schemas, shapes for the compiler, gradients, torch.compile over a whole decoder layer."""

from __future__ import annotations

import pytest
import torch
from kernel_tools import matrix
from torch import nn

from quantkit.errors import FormatError
from quantkit.formats import get_format
from quantkit.kernels import ops, repack

ENDS = torch.tensor([3, 3, 7], dtype=torch.int32)


def packed(name: str, *shape: int) -> torch.Tensor:
    """Packed rows (…, rows, bytes) of small random weights. shape: (…, rows, blocks)."""
    rows, _ = matrix(get_format(name), int(torch.tensor(shape[:-1]).prod()), shape[-1])
    return rows.reshape(*shape[:-1], -1)


def calls() -> dict:
    """One call for each operator: (operator, its arguments)."""
    x, low, up = (
        torch.randn(7, 512, requires_grad=True),
        torch.randn(7, 4, requires_grad=True),
        torch.randn(13, 4, requires_grad=True),
    )
    rows, experts = packed("Q4_K", 13, 2), packed("Q6_K", 3, 13, 2)
    back = torch.randn(7, 13, requires_grad=True)
    q = torch.ops.quantkit
    return {
        "dequantize": (q.dequantize, (rows, "Q4_K", torch.bfloat16)),
        "embedding": (q.embedding, (torch.tensor([[3, 0]]), rows, "Q4_K", torch.float32)),
        "linear": (q.linear, (x, rows, "Q4_K", None, None)),
        "low_rank": (q.linear, (x, rows, "Q4_K", low, up)),
        "linear_transposed": (q.linear_transposed, (back, rows, "Q4_K")),
        "grouped": (q.grouped, (x, experts, "Q6_K", ENDS, False)),
        "grouped_transposed": (q.grouped, (back, experts, "Q6_K", ENDS, True)),
        "grouped_plain": (q.grouped_plain, (x, torch.randn(3, 13, 512, requires_grad=True), ENDS, False)),
        "grouped_plain_frozen": (q.grouped_plain, (x, torch.randn(3, 13, 512).bfloat16(), ENDS, False)),
        "grouped_plain_transposed": (q.grouped_plain, (back, torch.randn(3, 13, 512, requires_grad=True), ENDS, True)),
        "swiglu": (q.swiglu, (x, rows, packed("Q4_0", 13, 16), "Q4_K", "Q4_0", None)),
        "swiglu_experts": (q.swiglu, (x, experts, packed("Q4_0", 3, 13, 16), "Q6_K", "Q4_0", ENDS)),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_operators_keep_their_word(name):
    operator, arguments = calls()[name]
    torch.library.opcheck(operator.default, arguments)


def plain(name: str, arguments: tuple) -> torch.Tensor:
    """The same with decoded weights, in torch."""
    if name in ("linear", "low_rank"):
        x, rows, fmt, low, up = arguments
        out = x @ ops.dequantize(rows, fmt, torch.float32).T
        return out if low is None else out + low @ up.T
    if name == "linear_transposed":
        return arguments[0] @ ops.dequantize(arguments[1], arguments[2], torch.float32)
    if name.startswith("grouped"):
        x, experts, *fmt, ends, transposed = arguments
        weights = ops.dequantize(experts, *fmt, torch.float32) if fmt else experts.float()
        parts = zip(torch.tensor_split(x, ends[:-1].tolist()), weights, strict=True)
        return torch.cat([part @ (w if transposed else w.T) for part, w in parts])
    x, gate, up, fmt_gate, fmt_up, ends = arguments
    if ends is None:
        return nn.functional.silu(plain("linear", (x, gate, fmt_gate, None, None))) * plain("linear", (x, up, fmt_up, None, None))
    g, u = plain("grouped", (x, gate, fmt_gate, ends, False)), plain("grouped", (x, up, fmt_up, ends, False))
    return nn.functional.silu(g) * u


@pytest.mark.parametrize("name", [name for name in calls() if name not in ("dequantize", "embedding")])
def test_values_and_gradients_are_those_of_decoded_weights(name):
    operator, arguments = calls()[name]
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    ours, theirs = operator(*arguments), plain(name, arguments)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
    seed = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(theirs, inputs, seed), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_low_rank_additions_must_fit():
    rows, x = packed("Q4_K", 13, 2), torch.randn(7, 512)
    for low, up in (
        (torch.randn(7, 4), None),
        (torch.randn(7, 4), torch.randn(13, 5)),
        (torch.randn(6, 4), torch.randn(13, 4)),
        (torch.randn(7, 4).half(), torch.randn(13, 4)),
    ):
        with pytest.raises(FormatError, match="low-rank addition"):
            ops.linear(x, rows, "Q4_K", low, up)


def test_shapes_and_autocast_are_those_of_torchs_products():
    """More axes, no tokens, and half precision where autocast is on, low-rank addition included."""
    rows, up = packed("Q4_K", 13, 2), packed("Q4_0", 13, 16)
    x = torch.randn(2, 3, 512)
    assert ops.swiglu(x, rows, up, "Q4_K", "Q4_0").shape == (2, 3, 13)
    assert torch.equal(
        ops.swiglu(x, rows, up, "Q4_K", "Q4_0").reshape(6, 13), ops.swiglu(x.reshape(6, 512), rows, up, "Q4_K", "Q4_0")
    )
    nothing = torch.zeros(0, 4, requires_grad=True)
    factor = torch.randn(13, 4, requires_grad=True)
    out = ops.linear(torch.zeros(0, 512, requires_grad=True), rows, "Q4_K", nothing, factor)
    out.sum().backward()
    assert out.shape == (0, 13) and not factor.grad.any()
    down = torch.randn(4, 512) / 16
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear(x, rows, "Q4_K", x @ down.T, factor)
    expected = ops.linear(x, rows, "Q4_K", x @ down.T, factor)
    assert found.dtype == torch.bfloat16 and torch.allclose(
        found.float(), expected, rtol=0.02, atol=0.02 * float(expected.detach().abs().max())
    )
    for bad in (lambda: ops.linear(x, packed("Q4_K", 3, 13, 2), "Q4_K"), lambda: ops.grouped(x[0], rows, "Q4_K", ENDS),
                lambda: ops.grouped(torch.randn(7, 512), packed("Q4_K", 3, 13, 2), "Q4_K", ENDS.float())):  # fmt: skip
        with pytest.raises(FormatError, match="do not fit"):
            bad()


def test_repacked_bytes_give_the_same():
    rows, x = packed("Q6_K", 13, 2), torch.randn(3, 512)
    moved = repack.pack(rows, get_format("Q6_K"))
    assert torch.equal(ops.linear(x, rows, "Q6_K"), ops.linear(x, moved, "Q6_K:planes"))
