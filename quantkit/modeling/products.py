"""How matrices are multiplied: float32 by the faster library, and BF16 for the statistics of large models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _can(feature: str) -> bool:
    import torch

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get(feature))


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies BF16 matrices in hardware (AVX-512 BF16 or AMX)."""
    return _can("avx512_bf16") or _can("amx_bf16")


@contextlib.contextmanager
def fast_float32(exact: bool = True) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices: on an AMD EPYC 2.3 times as fast as the library torch takes by default.

    The switch allows BF16 products with float32 sums, which oneDNN makes only on processors with AMX. exact: leave
    those alone. Measured elsewhere: as exact as before (6e-7 against double precision). Also a decorator.
    """
    import torch

    if exact and _can("amx_bf16"):
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias in the type of x. A BF16 weight takes x rounded to BF16; sums are float32, rounded once."""
    from torch.nn.functional import linear

    if weight.dtype == x.dtype:
        return linear(x, weight, bias)
    y = linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


def gram(x: torch.Tensor, half: bool) -> torch.Tensor:
    """xᵀ x of (tokens, columns), float32. half: of x rounded to BF16, the sums rounded too."""
    if half:
        x = x.bfloat16()
    return (x.T @ x).float()


class Restore:
    """Takes a module's own forward away again."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def remove(self) -> None:
        """Restore the class's forward."""
        del self._module.forward


def use_bfloat16(module: torch.nn.Linear) -> Restore:
    """Keep a linear map's weight in BF16 and multiply so; returns a handle that gives it its forward back."""
    import torch

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)

    module.weight = torch.nn.Parameter(module.weight.data.bfloat16(), requires_grad=False)
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return Restore(module)
