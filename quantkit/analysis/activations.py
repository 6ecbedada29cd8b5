"""Quantize and dequantize what flows through a model: activations, and the keys and values of its cache.

The rules are those of the runtimes that do it: symmetric INT8 and FP8 E4M3 with a scale from the largest
magnitude of a token or of the whole tensor (vLLM's dynamic modes), and ggml's Q8_0 and Q4_0 for the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quantkit.encoders import get_encoder
from quantkit.errors import FormatError
from quantkit.formats import get_format

if TYPE_CHECKING:
    import torch

Per = Literal["token", "tensor"]
TINY = 1e-30
FP4_GROUP = 16


def scale_of(x: torch.Tensor, top: float, per: Per) -> torch.Tensor:
    """The scale that makes the largest magnitude ``top``: one for each token (last axis) or one for all."""
    peak = x.abs().amax(-1, keepdim=True) if per == "token" else x.abs().max()
    return peak.clamp_min(TINY) / top


def int8(x: torch.Tensor, per: Per = "token") -> torch.Tensor:
    """x as it comes back from symmetric INT8, codes −127 … 127. Any shape; the last axis is the channels."""
    scale = scale_of(x, 127, per)
    return (x / scale).round() * scale


def fp8(x: torch.Tensor, per: Per = "token") -> torch.Tensor:
    """x as it comes back from FP8 E4M3 (largest number 448). Any shape; the last axis is the channels."""
    import torch

    scale = scale_of(x, torch.finfo(torch.float8_e4m3fn).max, per)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def fp4(x: torch.Tensor) -> torch.Tensor:
    """x as it comes back from NVFP4: E2M1 in groups of 16 with an E4M3 scale, which has one F32 factor for the whole tensor.

    Any shape; the last axis is the channels, a multiple of 16. The factor makes the largest scale 448, as in vLLM's and
    TensorRT's dynamic mode. Raises FormatError if a row has no whole groups.
    """
    import torch

    if x.shape[-1] % FP4_GROUP:
        raise FormatError(f"rows of {x.shape[-1]} have no whole groups of {FP4_GROUP}", hint="use INT8 or FP8 activations")
    groups = x.float().reshape(*x.shape[:-1], -1, FP4_GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 6
    factor = scale.max().clamp_min(TINY) / torch.finfo(torch.float8_e4m3fn).max
    stored = ((scale / factor).to(torch.float8_e4m3fn).float() * factor).clamp_min(TINY)
    steps = x.new_tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float32)
    codes = torch.bucketize((groups / stored).abs(), (steps[1:] + steps[:-1]) / 2)
    return (steps[codes] * groups.sign() * stored).reshape(x.shape).to(x.dtype)


def blocks(x: torch.Tensor, name: str) -> torch.Tensor:
    """x as it comes back from a GGUF format along its last axis, as llama.cpp keeps a quantized KV cache.

    Raises FormatError if the last axis (the head's width) is no multiple of the format's block.
    """
    import torch

    fmt = get_format(name)
    rows = x.reshape(-1, x.shape[-1]).float().numpy()
    return torch.from_numpy(fmt.decode(get_encoder("ggml").encode(rows, None, fmt, name="KV cache"))).reshape(x.shape).to(x.dtype)


class QuantizedCache:
    """Stands where transformers expects a KV cache and returns keys and values as a format keeps them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, heads, tokens, width), quantized and back."""
        return blocks(keys, self._name), blocks(values, self._name)


def relative_error(x: torch.Tensor, rounded: torch.Tensor, weight: torch.Tensor) -> float:
    """‖W(x̂ − x)‖² / ‖Wx‖². x, rounded: (tokens, columns); weight: (rows, columns)."""
    exact = x @ weight.T
    return float(((rounded - x) @ weight.T).square().sum() / exact.square().sum().clamp_min(TINY))
