"""K-quants and FP4 encoded on a GPU, byte for byte what ggml (built without contraction) and ``encoders`` write.

Searches are Triton programs; what is done for each weight by itself is torch; bits are packed by the statement of the
format's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.formats.grids import table
from quantkit.formats.layout import Integers
from quantkit.formats.layout import Table as Values
from quantkit.kernels.devices import launch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LANES = 128
PART = 1 << 25  # weights that are encoded at a time
ROUND = 12582912.0
TINY = 1e-15
F32 = np.float32


def encode(weight: Tensor, fmt: type[Format], importance: Tensor | None = None, name: str = "tensor") -> Tensor:
    """Packed rows of float32 weights (rows, columns) on their device: uint8 (rows, bytes).

    importance: float32 (columns,), as ggml weighs errors. Raises FormatError for a format that has no encoder here, for
    rows that are no whole blocks, and for weights that are not finite or too large.
    """
    import torch

    if fmt.name not in ENCODERS:
        raise FormatError(f"{fmt.name} is not encoded on a GPU", hint=f"encode on the CPU; there are {', '.join(ENCODERS)}")
    bytes_of_row = fmt.row_bytes(weight.shape[1])
    if weight.dtype != torch.float32 or (importance is not None and importance.shape != weight.shape[1:]):
        raise FormatError(
            f"{name}: weights are {weight.dtype}, {tuple(weight.shape)}",
            hint="give float32 (rows, columns) and one importance a column",
        )
    if not bool(torch.isfinite(weight).all()):
        raise FormatError(f"{name} has weights that are not finite", hint="the checkpoint is damaged")
    step = max(1, PART // weight.shape[1])
    out = torch.empty(len(weight), bytes_of_row, dtype=torch.uint8, device=weight.device)
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].contiguous()
        weights = None if importance is None else importance.to(torch.float32).expand(rows.shape)
        parts = ENCODERS[fmt.name](rows, weights)
        for part in parts.values():
            if part.dtype == torch.float16 and not bool(torch.isfinite(part).all()):
                raise FormatError(f"{name} has weights too large for {fmt.name}'s half precision", hint="keep it in BF16")
        out[first : first + step] = pack(parts, fmt).reshape(len(rows), bytes_of_row)
    return out


def pack(parts: dict[str, Tensor], fmt: type[Format]) -> Tensor:
    """Integers and half-precision fields of blocks, each (blocks, items), as bytes: uint8 (blocks, bytes)."""
    import torch

    blocks = next(iter(parts.values())).shape[0]
    device = next(iter(parts.values())).device
    bits = torch.zeros(blocks, 8 * fmt.block_bytes(), dtype=torch.uint8, device=device)
    for name, values in parts.items():
        held = fmt.integers().get(name)
        if isinstance(held, Integers):
            places = torch.from_numpy(held.positions(fmt.layout)).to(device)
            width = torch.arange(held.width, dtype=torch.int32, device=device)
            bits[:, places.reshape(-1)] = ((values.int()[:, :, None] >> width) & 1).to(torch.uint8).reshape(blocks, -1)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=device)
    out = (bits.reshape(blocks, -1, 8) * powers).sum(-1, dtype=torch.uint8)
    for name, values in parts.items():
        if values.dtype == torch.float16:
            place = int(fmt.layout.fields[name][1])  # type: ignore[index]
            out[:, place : place + 2] = values.reshape(blocks, 1).contiguous().view(torch.uint8)
    return out


# -- what is done for each weight by itself --------------------------------------------------------


def _nearest(value: Tensor) -> Tensor:
    """The nearest integer as ggml computes it, int32."""
    import torch

    return ((value + ROUND).view(torch.int32) & 0x007FFFFF) - 0x00400000


def _over(value: Tensor, number: float) -> Tensor:
    """value / number, rounded as IEEE says. torch multiplies by the reciprocal where one side is a number of Python."""
    import torch

    return value / torch.full_like(value, number)


def _under(number: float, value: Tensor) -> Tensor:
    """number / value, see ``_over``."""
    import torch

    return torch.full_like(value, number) / value


def _root(value: Tensor) -> Tensor:
    """The square root, rounded correctly; torch's own in float32 is a little off on some CPUs."""
    return value.double().sqrt().float()


def _first_peak(values: Tensor) -> Tensor:
    """The first of the entries (blocks, n) with the largest magnitude: (blocks, 1)."""
    same = values.abs() == values.abs().amax(1, keepdim=True)
    first = same & (same.cumsum(1) == 1)
    return (values * first).sum(1, keepdim=True)


# -- searches -------------------------------------------------------------------------------------


def _run(program: Any, count: int, **arguments: Any) -> None:
    launch(program, (-(-count // LANES),), arguments["x"], **arguments, count=count, LANES=LANES, enable_fp_fusion=False)


def _sums(groups: Tensor, squared: bool) -> Tensor:
    """Sums over the last axis, in order: (groups,)."""
    from quantkit.kernels.programs_encode import ordered_sum

    out = groups.new_empty(len(groups))
    _run(ordered_sum, len(groups), x=groups.contiguous(), out=out, n=groups.shape[1], SQUARED=squared)
    return out


def _mean_square(groups: Tensor) -> Tensor:
    return _over(_sums(groups, squared=True), groups.shape[1])


def _affine(groups: Tensor, weights: Tensor, top: int, rmin: float, rdelta: float, steps: int, mean_abs: bool = False) -> Any:
    """(scales, minimums, codes) of groups (count, n); codes int32 (count, n) as the search left them."""
    from quantkit.kernels.programs_encode import affine_fit

    scale, minimum, inverse, offset = (groups.new_empty(len(groups)) for _ in range(4))
    grids = _table(tuple(F32(rmin) + F32(rdelta) * F32(step) + F32(top) for step in range(steps + 1)), groups.device)
    _run(
        affine_fit, len(groups), x=groups.contiguous(), weight=weights.contiguous(), grids=grids, scale=scale, minimum=minimum,
        inverse=inverse, offset=offset, n=groups.shape[1], steps=steps + 1, top=float(top), MEAN_ABS=mean_abs,
    )  # fmt: skip
    return scale, minimum, _nearest(inverse[:, None] * (groups - offset[:, None])).clamp(0, top)


def _symmetric(groups: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scales, codes with ``top`` added) of groups; codes of a zero group are 0."""
    from quantkit.kernels.programs_encode import symmetric_fit

    scale, inverse = groups.new_empty(len(groups)), groups.new_empty(len(groups))
    steps = [*range(-9, 0), *range(1, 10)]
    numerators = _table((-F32(top), *(-(F32(top) + F32(0.1) * F32(step)) for step in steps)), groups.device)
    _run(
        symmetric_fit, len(groups), x=groups.contiguous(), weight=weights.contiguous(), numerators=numerators, scale=scale,
        inverse=inverse, n=groups.shape[1], steps=len(numerators), top=float(top),
    )  # fmt: skip
    codes = _nearest(inverse[:, None] * groups).clamp(-top, top - 1) + top
    return scale, codes.masked_fill(inverse[:, None] == 0, 0)


def _positive(groups: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale, codes) of the scales or minimums of super-blocks."""
    import torch

    from quantkit.kernels.programs_encode import positive_fit

    scale, codes = groups.new_empty(len(groups)), torch.empty(groups.shape, dtype=torch.int32, device=groups.device)
    steps = [*range(-4, 0), *range(1, 5)]
    numerators = _table((F32(top), *(F32(0.1) * F32(step) + F32(top) for step in steps)), groups.device)
    _run(
        positive_fit, len(groups), x=groups.contiguous(), weight=weights.contiguous(), numerators=numerators, scale=scale,
        codes=codes, n=groups.shape[1], steps=len(numerators), TOP=top,
    )  # fmt: skip
    return scale, codes


def _plain(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale, codes) of non-negative numbers (blocks, n): the largest becomes ``top``."""
    import torch

    largest = values.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 0.0)  # and not -0
    inverse = torch.where(largest > 0, _under(top, largest), 0.0)
    return _over(largest, top)[:, 0], _nearest(inverse * values).clamp(max=top)


@cache
def _table_on(values: tuple[float, ...], device: str) -> Tensor:
    import torch

    return torch.tensor(np.array(values, F32)).to(device)


def _table(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """float32 numbers on a device."""
    return _table_on(tuple(float(v) for v in values), str(device))


# -- formats --------------------------------------------------------------------------------------

Parts = dict[str, "Tensor"]


def _spread(x: Tensor, factor: float) -> Tensor:
    """factor · mean square of every super-block of 256, for each weight: as x."""
    wide = x.reshape(-1, 256)
    return (factor * _mean_square(wide))[:, None].expand(wide.shape).reshape(x.shape)


def _affine_parts(x: Tensor, scales: Any, minimums: Any, codes: Tensor, n: int, top: int) -> Parts:
    """Block scales in half precision and the codes that are nearest with them. scales, minimums: (block scale, codes)."""
    import torch

    groups = 256 // n
    d, m = scales[0].half(), minimums[0].half()
    step = (d.float()[:, None] * scales[1].float()).reshape(-1, 1)
    low = (m.float()[:, None] * minimums[1].float()).reshape(-1, 1)
    again = _nearest((x.reshape(-1, n) + low) / step).clamp(0, top)
    codes = torch.where(step != 0, again, codes).reshape(-1, groups * n)
    return {"d": d, "dmin": m, "scales": scales[1], "minimums": minimums[1], "codes": codes}


def _k_affine(n: int, top: int, scale_top: int, factor: float, plain: tuple[float, float, int], mean_abs: bool) -> Callable[..., Parts]:  # fmt: skip
    """Q2_K, Q4_K and Q5_K. n: weights of a sub-block; factor: of the mean square in the weights; plain: the search without importance."""

    def run(x: Tensor, importance: Tensor | None) -> Parts:
        groups = x.reshape(-1, n)
        if importance is not None:
            weights = (importance * _root(_spread(x, factor) + x * x)).reshape(-1, n)
            scale, minimum, codes = _affine(groups, weights, top, -0.9, 0.05, 36)
            sums = _sums(weights, squared=False).reshape(-1, 256 // n)
            found = [_positive(part.reshape(-1, 256 // n), sums, scale_top) for part in (scale, minimum)]
        else:
            weights = groups.abs() if mean_abs else _root(_mean_square(groups))[:, None] + groups.abs()
            scale, minimum, codes = _affine(groups, weights, top, *plain, mean_abs)
            found = [_plain(part.reshape(-1, 256 // n), scale_top) for part in (scale, minimum)]
        return _affine_parts(x, found[0], found[1], codes, n, top)

    return run


def _q3_k(x: Tensor, importance: Tensor | None) -> Parts:
    import torch

    groups = x.reshape(-1, 16)
    if importance is not None:
        weights = (importance * _root(_spread(x, 2.0) + x * x)).reshape(-1, 16)
        scale, codes = _symmetric(groups, weights, 4)
        d, scales = _symmetric(scale.reshape(-1, 16), _sums(weights, squared=False).reshape(-1, 16), 32)
        d = d.half()
    else:
        from quantkit.kernels.programs_encode import descent_fit

        scale, codes = groups.new_empty(len(groups)), torch.empty(groups.shape, dtype=torch.int32, device=x.device)
        _run(descent_fit, len(groups), x=groups.contiguous(), scale=scale, codes=codes, n=16)
        of_block = scale.reshape(-1, 16)
        peak = _first_peak(of_block)
        inverse = _under(-32, peak)
        scales = torch.where(peak != 0, _nearest(inverse * of_block).clamp(-32, 31) + 32, 0)
        d = torch.where(peak != 0, _under(1, inverse), 0.0)[:, 0].half()
    step = (d.float()[:, None] * (scales - 32).float()).reshape(-1, 1)
    again = _nearest(groups / step).clamp(-4, 3) + 4
    return {"d": d, "scales": scales, "codes": torch.where(step != 0, again, codes).reshape(-1, 256)}


def _q6_k(x: Tensor, importance: Tensor | None) -> Parts:
    import torch

    groups = x.reshape(-1, 16)
    scale, codes = _symmetric(groups, groups * groups if importance is None else importance.reshape(-1, 16), 32)
    of_block = scale.reshape(-1, 16)
    peak = _first_peak(of_block)
    dead = peak.abs() < TINY
    inverse = _under(-128, peak)
    d = torch.where(dead, 0.0, _under(1, inverse))[:, 0].half()
    scales = _nearest(inverse * of_block).clamp(max=127).masked_fill(dead, 0)
    step = (d.float()[:, None] * scales.float()).reshape(-1, 1)
    again = _nearest(groups / step).clamp(-32, 31) + 32
    codes = torch.where(step != 0, again, codes).reshape(-1, 256).masked_fill(dead, 0)
    return {"d": d, "scales": scales, "codes": codes}


def _q8_0(x: Tensor, importance: Tensor | None) -> Parts:
    import torch

    groups = x.reshape(-1, 32)
    d = _over(groups.abs().amax(1, keepdim=True), 127)
    scaled = groups * torch.where(d != 0, _under(1, d), 0.0)
    whole = scaled.abs().floor()
    whole = torch.where(scaled.abs() - whole >= 0.5, whole + 1, whole)
    return {"d": d[:, 0].half(), "codes": torch.where(scaled >= 0, whole, -whole).int()}


def _fp4_codes(groups: Tensor, scale: Tensor, fmt_values: tuple[int, ...]) -> Tensor:
    """Nearest of the sixteen numbers, the first of equals."""
    import torch

    best, codes = (fmt_values[0] * scale - groups).abs(), torch.zeros(groups.shape, dtype=torch.int32, device=groups.device)
    for code, value in enumerate(fmt_values[1:], 1):
        error = (value * scale - groups).abs()
        codes = torch.where(error < best, code, codes)
        best = torch.minimum(error, best)
    return codes


def _values(name: str) -> tuple[int, ...]:
    from quantkit.formats import get_format

    values = get_format(name).values
    assert isinstance(values, Values)
    return tuple(int(entry) for entry in values.entries)


def _mxfp4(x: Tensor, importance: Tensor | None) -> Parts:
    import torch

    groups = x.reshape(-1, 32)
    largest = groups.abs().amax(1, keepdim=True)
    exponent = largest.double().log2().float().floor().nan_to_num(neginf=0).int()
    e = torch.where(largest > 0, (exponent - 2 + 127) & 255, 0)
    scale = _table(tuple(table("e8m0_half")), x.device)[e.long()]
    return {"scales": e, "codes": _fp4_codes(groups, scale, _values("MXFP4"))}


def _ue4m3(value: Tensor) -> Tensor:
    """Positive numbers as unsigned E4M3: halves round up, at most 448."""
    import torch

    value = value.clamp(max=448)
    bits = value.view(torch.int32)
    exponent = ((bits >> 23) & 255) - 120
    mantissa = ((bits >> 20) & 7) + ((bits >> 19) & 1)
    exponent, mantissa = torch.where(mantissa > 7, exponent + 1, exponent), torch.where(mantissa > 7, 0, mantissa)
    normal = torch.where(exponent >= 15, 0x7E, (exponent << 3) | mantissa)
    small = (value * 512 + 0.5).int().clamp(max=7)
    return torch.where(value > 0, torch.where(((bits >> 23) & 255) <= 120, small, normal), 0)


def _nvfp4(x: Tensor, importance: Tensor | None) -> Parts:
    groups = x.reshape(-1, 16)
    codes = _ue4m3(_over(groups.abs().amax(1, keepdim=True), 6))
    scale = _table(tuple(table("ue4m3_half")), x.device)[codes.long()]
    return {"scales": codes.reshape(-1, 4), "codes": _fp4_codes(groups, scale, _values("NVFP4")).reshape(-1, 64)}


ENCODERS: dict[str, Callable[..., Parts]] = {
    "Q2_K": _k_affine(16, 3, 15, 1.0, (-0.5, 0.1, 15), mean_abs=True),
    "Q3_K": _q3_k,
    "Q4_K": _k_affine(32, 15, 63, 2.0, (-1.0, 0.1, 20), mean_abs=False),
    "Q5_K": _k_affine(32, 31, 63, 2.0, (-0.5, 0.1, 15), mean_abs=False),
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
