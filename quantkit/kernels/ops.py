"""The products as operators of torch: with shapes for the compiler and gradients for the inputs; packed weights have none.

``packing`` is a format's name, with ``:planes`` after it where the tensor was repacked (packing.Packing).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from quantkit.kernels import dequantize as decoding
from quantkit.kernels import product
from quantkit.kernels.packing import Packing

# Annotations are read when an operator is registered, so they are given as they are and not as strings.
_define = torch.library.custom_op


def _width(weight: Tensor, packing: str) -> int:
    return Packing.of(packing).columns(weight)


def _dequantize(weight, packing, dtype):
    return decoding.dequantize(weight, Packing.of(packing), dtype)


def _embedding(ids, weight, packing, dtype):
    return decoding.embedding(ids, weight, Packing.of(packing), dtype)


def _linear(x, weight, packing, low, up):
    return product.matmul(x, weight, Packing.of(packing), low, up)


def _linear_transposed(x, weight, packing):
    return product.matmul_transposed(x, weight, Packing.of(packing))


def _grouped(x, weight, packing, ends, transposed):
    return product.grouped(x, weight, Packing.of(packing), ends, transposed)


def _grouped_plain(x, weight, ends, transposed):
    bounds = [0, *ends.tolist()]
    matrices = weight.to(x.dtype) if transposed else weight.to(x.dtype).mT
    return torch.cat([x[a:b] @ matrix for a, b, matrix in zip(bounds, bounds[1:], matrices, strict=False)])


def _grouped_outer(left, right, ends):
    bounds = [0, *ends.tolist()]
    return torch.stack([left[a:b].T @ right[a:b] for a, b in pairwise(bounds)])


def _swiglu(x, gate, up, packing_gate, packing_up, ends):
    return product.swiglu(x, gate, up, (Packing.of(packing_gate), Packing.of(packing_up)), ends)


def _operator(name, schema, function, fake):
    made = _define(f"quantkit::{name}", function, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


dequantize = _operator(
    "dequantize", "(Tensor weight, str packing, ScalarType dtype) -> Tensor", _dequantize,
    lambda weight, packing, dtype: weight.new_empty(*weight.shape[:-1], _width(weight, packing), dtype=dtype),
)  # fmt: skip
embedding = _operator(
    "embedding", "(Tensor ids, Tensor weight, str packing, ScalarType dtype) -> Tensor", _embedding,
    lambda ids, weight, packing, dtype: weight.new_empty(*ids.shape, _width(weight, packing), dtype=dtype),
)  # fmt: skip
_linear_op = _operator(
    "linear", "(Tensor x, Tensor weight, str packing, Tensor? low, Tensor? up) -> Tensor", _linear,
    lambda x, weight, packing, low, up: x.new_empty(*x.shape[:-1], weight.shape[0]),
)  # fmt: skip
_linear_transposed_op = _operator(
    "linear_transposed", "(Tensor x, Tensor weight, str packing) -> Tensor", _linear_transposed,
    lambda x, weight, packing: x.new_empty(*x.shape[:-1], _width(weight, packing)),
)  # fmt: skip
_grouped_op = _operator(
    "grouped", "(Tensor x, Tensor weight, str packing, Tensor ends, bool transposed) -> Tensor", _grouped,
    lambda x, weight, packing, ends, transposed: x.new_empty(
        x.shape[0], _width(weight, packing) if transposed else weight.shape[1]
    ),
)  # fmt: skip
_grouped_plain_op = _operator(
    "grouped_plain", "(Tensor x, Tensor weight, Tensor ends, bool transposed) -> Tensor", _grouped_plain,
    lambda x, weight, ends, transposed: x.new_empty(x.shape[0], weight.shape[2 if transposed else 1]),
)  # fmt: skip
_grouped_outer_op = _operator(
    "grouped_outer", "(Tensor left, Tensor right, Tensor ends) -> Tensor", _grouped_outer,
    lambda left, right, ends: left.new_empty(ends.shape[0], left.shape[1], right.shape[1]),
)  # fmt: skip
_swiglu_op = _operator(
    "swiglu", "(Tensor x, Tensor gate, Tensor up, str packing_gate, str packing_up, Tensor? ends) -> Tensor", _swiglu,
    lambda x, gate, up, packing_gate, packing_up, ends: x.new_empty(*x.shape[:-1], gate.shape[-2]),
)  # fmt: skip


def _cast(x: Tensor) -> Tensor:
    """Inputs in autocast's type where it is on, as torch's own products take them."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear(x: Tensor, weight: Tensor, packing: str, low: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """x · Wᵀ [+ low · upᵀ]: see product.matmul. Gradients for x, low and up."""
    return _linear_op(_cast(x), weight, packing, None if low is None else _cast(low), None if up is None else _cast(up))


def linear_transposed(x: Tensor, weight: Tensor, packing: str) -> Tensor:
    """x · W: see product.matmul_transposed. A gradient for x."""
    return _linear_transposed_op(_cast(x), weight, packing)


def grouped(x: Tensor, weight: Tensor, packing: str, ends: Tensor, transposed: bool = False) -> Tensor:
    """Every token, sorted by expert, times the matrix of its expert: see product.grouped. A gradient for x."""
    return _grouped_op(_cast(x), weight, packing, ends, transposed)


def grouped_plain(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """``grouped`` for matrices that are not packed, (experts, rows, columns), of any float type. Gradients for both."""
    return _grouped_plain_op(_cast(x), weight, ends, transposed)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, packing_gate: str, packing_up: str, ends: Tensor | None = None) -> Tensor:
    """silu(x · gateᵀ) ∘ (x · upᵀ): see product.swiglu. A gradient for x, for which both products are made again."""
    return _swiglu_op(_cast(x), gate, up, packing_gate, packing_up, ends)


# -- gradients ------------------------------------------------------------------------------------


def _keep_linear(ctx, inputs, output):
    _, weight, ctx.packing, low, up = inputs
    ctx.save_for_backward(weight, low, up)


def _linear_backward(ctx, grad):
    weight, low, up = ctx.saved_tensors
    back = linear_transposed(grad, weight, ctx.packing) if ctx.needs_input_grad[0] else None
    if up is None:
        return back, None, None, None, None
    flat = grad.reshape(-1, grad.shape[-1])
    grad_low = grad @ up if ctx.needs_input_grad[3] else None
    grad_up = flat.T @ low.reshape(-1, low.shape[-1]) if ctx.needs_input_grad[4] else None
    return back, None, None, grad_low, grad_up


def _keep_transposed(ctx, inputs, output):
    _, weight, ctx.packing = inputs
    ctx.save_for_backward(weight)


def _transposed_backward(ctx, grad):
    (weight,) = ctx.saved_tensors
    return linear(grad, weight, ctx.packing), None, None


def _keep_grouped(ctx, inputs, output):
    _, weight, ctx.packing, ends, ctx.transposed = inputs
    ctx.save_for_backward(weight, ends)


def _grouped_backward(ctx, grad):
    weight, ends = ctx.saved_tensors
    return grouped(grad.contiguous(), weight, ctx.packing, ends, not ctx.transposed), None, None, None, None


def _keep_grouped_plain(ctx, inputs, output):
    x, weight, ends, ctx.transposed = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight, ends)


def _grouped_plain_backward(ctx, grad):
    x, weight, ends = ctx.saved_tensors
    back = grouped_plain(grad.contiguous(), weight, ends, not ctx.transposed) if ctx.needs_input_grad[0] else None
    if x is None:
        return back, None, None, None
    left, right = (x, grad) if ctx.transposed else (grad, x)
    return back, _grouped_outer_op(left.contiguous(), right.contiguous(), ends).to(weight.dtype), None, None


def _keep_swiglu(ctx, inputs, output):
    x, gate, up, ctx.packing_gate, ctx.packing_up, ends = inputs
    ctx.save_for_backward(x, gate, up, ends)


def _swiglu_backward(ctx, grad):
    x, gate, up, ends = ctx.saved_tensors

    def product(value, weight, packing, transposed=False):
        if ends is not None:
            return grouped(value, weight, packing, ends, transposed)
        return linear_transposed(value, weight, packing) if transposed else linear(value, weight, packing)

    g, u = product(x, gate, ctx.packing_gate), product(x, up, ctx.packing_up)
    s = torch.sigmoid(g)
    back = product((grad * u * s * (1 + g * (1 - s))).contiguous(), gate, ctx.packing_gate, transposed=True)
    back = back + product((grad * g * s).contiguous(), up, ctx.packing_up, transposed=True)
    return back, None, None, None, None, None


_linear_op.register_autograd(_linear_backward, setup_context=_keep_linear)
_linear_transposed_op.register_autograd(_transposed_backward, setup_context=_keep_transposed)
_grouped_op.register_autograd(_grouped_backward, setup_context=_keep_grouped)
_grouped_plain_op.register_autograd(_grouped_plain_backward, setup_context=_keep_grouped_plain)
_swiglu_op.register_autograd(_swiglu_backward, setup_context=_keep_swiglu)
