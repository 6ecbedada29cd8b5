"""Packed layers whose block scales and minimums learn while their codes stay. Imported only inside functions: it needs torch.

Training step sizes after the codes are fixed is EfficientQAT's second phase (arXiv 2407.11062). Forward, every scale is
rounded as the format stores it, so that training sees what the file will give; backward, rounding counts as nothing
(straight through, arXiv 1308.3432). One layer at a time is decoded, and again for its gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkit.encoders.parameters import Parameters
from quantkit.formats.layout import Integers
from quantkit.formats.tensors.blocks import packed_format
from quantkit.kernels import ops, repack
from quantkit.modeling.modules import PLAIN, QuantExperts, QuantLinear


class Scales(nn.Module):
    """The scales of one packed tensor: W = s · (W₀ − M₀) + m · M₀, where M₀ is what the minimums give, and s and m begin as ones.

    packed: uint8 (…, bytes of a row), read as ``packing`` says. scale, minimum: (rows, blocks of a row). Made once the model
    is on its device.
    """

    stored: Tensor
    steps: Tensor
    floor: Tensor
    lowest: Tensor

    def __init__(self, packed: Tensor, format: str, packing: str) -> None:
        super().__init__()
        self._fmt, self._format, self._packing = packed_format(format), format, packing
        self._layer = (packed,)  # a tuple, because it is the layer's own and not a part of what is learned
        numbers = Parameters(self._rows(), self._fmt)
        by_table = not numbers.tunes_scale
        stored = numbers.factors[numbers.scale] if by_table else numbers.block_scale.copy()
        self.register_buffer("stored", torch.from_numpy(stored).to(packed.device), persistent=False)
        table = np.unique(numbers.factors[np.isfinite(numbers.factors)]) if by_table else np.zeros(0, np.float32)
        steps = torch.from_numpy(table)
        self.register_buffer("steps", steps.to(packed.device), persistent=False)
        self.scale = nn.Parameter(torch.ones_like(self.stored))
        self.minimum: nn.Parameter | None = None
        if numbers.has_minimum:
            self.minimum = nn.Parameter(torch.ones(numbers.block_minimum.shape, device=packed.device))
            lowest = torch.from_numpy(numbers.block_minimum).to(packed.device)
            self.register_buffer("lowest", lowest, persistent=False)
            numbers.block_scale[:] = 0
            self.register_buffer("floor", torch.from_numpy(numbers.pack()).to(packed.device), persistent=False)

    def _rows(self) -> npt.NDArray[np.uint8]:
        data = self._layer[0].detach()
        plain = data if self._packing == self._format else repack.unpack(data, self._fmt)
        return plain.reshape(-1, plain.shape[-1]).cpu().numpy()

    def _rounded(self, numbers: Tensor) -> Tensor:
        """Scales as the format stores them: half precision, or the nearest of its table."""
        if not len(self.steps):
            return numbers.half().float()
        return self.steps[torch.bucketize(numbers, (self.steps[1:] + self.steps[:-1]) / 2)]

    def _ratio(self, stored: Tensor, factor: Tensor, rounded: Any) -> Tensor:
        """factor, rounded so that stored · ratio is a number of the format; its gradient is the factor's."""
        exact = torch.where(stored == 0, 1.0, rounded(stored * factor.detach()) / torch.where(stored == 0, 1.0, stored))
        return factor + (exact - factor).detach()

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, (…, columns), differentiable by scale and minimum."""
        weight = ops.dequantize(self._layer[0], self._packing, torch.float32)
        shape = weight.shape
        weight = weight.reshape(-1, shape[-1])
        ratio = self._ratio(self.stored, self.scale, self._rounded)
        if self.minimum is None:
            out = _by_block(weight, ratio)
        else:
            part = ops.dequantize(self.floor, self._format, torch.float32)
            lower = self._ratio(self.lowest, self.minimum, lambda numbers: numbers.half().float())
            out = _by_block(weight - part, ratio) + _by_block(part, lower)
        return out.reshape(shape).to(dtype)

    def pack(self) -> npt.NDArray[np.uint8]:
        """The rows with what was learned: uint8 (rows, bytes of a row); all codes are as before."""
        numbers = Parameters(self._rows(), self._fmt)
        learned = self._rounded(self.stored * self.scale.detach()).cpu().numpy()
        if numbers.tunes_scale:
            numbers.block_scale[:] = learned
        else:
            order = np.argsort(numbers.factors, kind="stable")
            found = order[np.searchsorted(numbers.factors[order], learned)]
            kept = numbers.factors[numbers.scale] == learned  # a table may have a number twice
            numbers.scale[:] = np.where(kept, numbers.scale, found)
        if self.minimum is not None:
            numbers.block_minimum[:] = (self.lowest * self.minimum.detach()).cpu().numpy()
        return numbers.pack()


def _by_block(weight: Tensor, factor: Tensor) -> Tensor:
    """weight (rows, columns) times a factor for each block, (rows, blocks)."""
    return (weight.reshape(*factor.shape, -1) * factor[..., None]).reshape(weight.shape)


def learnable(format: str) -> bool:
    """Whether the scales of a format can learn: a GGUF format with a code for each weight or group (TQ1_0 has digits instead)."""
    if format == PLAIN:
        return False
    fmt = packed_format(format)
    return fmt.gguf_id >= 0 and isinstance(fmt.codes, Integers)


class ScaledLinear(nn.Module):
    """x · Wᵀ + bias of a ``QuantLinear``, with scales that learn."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scales = Scales(base.weight, base.formats["weight"], base.packing("weight"))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._product, x, use_reentrant=False) if torch.is_grad_enabled() else self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.scales.value(x.dtype), self.bias)


class ScaledExperts(QuantExperts):
    """Routed experts with scales that learn."""

    scales: nn.ModuleDict

    def __init__(self, base: QuantExperts) -> None:
        super().__init__({name: getattr(base, name) for name in base.formats}, base.formats, base.activation)
        for name in base.formats:
            setattr(self, name, getattr(base, name))  # the parameters themselves, with the notes at them
        self.scales = nn.ModuleDict({
            name: Scales(getattr(base, name), fmt, base.packing(name)) for name, fmt in base.formats.items() if learnable(fmt)
        })  # fmt: skip

    def fused(self) -> bool:
        """Never: the scales' gradients need each product by itself."""
        return False

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        """As in ``QuantExperts``, from the weights with what was learned."""
        if name not in self.scales:
            return super().product(x, name, ends)
        return checkpoint(self._scaled, x, name, ends, use_reentrant=False)

    def _scaled(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        weight: Tensor = self.scales[name].value(x.dtype)  # type: ignore[operator]
        return ops.grouped_plain(x, weight, ends)


def with_scales(model: nn.Module) -> dict[str, Scales]:
    """Let the scales of all packed maps and experts in a model's layers learn; returns them by the name of their parameter."""
    found: dict[str, Scales] = {}
    for name, module in list(model.named_modules()):
        made: ScaledLinear | ScaledExperts
        if isinstance(module, QuantLinear) and ".layers." in name and learnable(module.formats["weight"]):
            made = ScaledLinear(module)
            found[f"{name}.weight"] = made.scales
        elif type(module) is QuantExperts:
            made = ScaledExperts(module)
            found |= {f"{name}.{part}": scales for part, scales in made.scales.items()}  # type: ignore[misc]
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
    return found
