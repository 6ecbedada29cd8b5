"""What quantized activations would cost: the error of a linear map's outputs on a sample of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def relative_error(x: torch.Tensor, rounded: torch.Tensor, weight: torch.Tensor) -> float:
    """‖W(x̂ − x)‖² / ‖Wx‖². x, rounded: (tokens, columns); weight: (rows, columns)."""
    exact = x @ weight.T
    return float(((rounded - x) @ weight.T).square().sum() / exact.square().sum().clamp_min(1e-30))


def int8_error(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Relative output error with symmetric INT8 activations, one scale per token."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return relative_error(x, (x / scale).round() * scale, weight)


def fp8_error(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Relative output error with FP8 E4M3 activations, one scale per tensor."""
    import torch

    scale = x.abs().max().clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return relative_error(x, (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale, weight)
