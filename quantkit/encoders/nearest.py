"""Method ``nearest``: a search that works for any format whose statement says what a code stands for.

A new format needs no encoder of its own: its table of values, its scales and its minimums are read from the
class. A few scales are tried for each group, the best is fitted by least squares and rounded as the format
keeps it, and codes are the nearest for what decoding will give. It is the slow and obvious way; ``ggml``
(bytes equal to llama.cpp's) is preferred where it exists.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.encoders.base import Encoder, check_finite, check_importance
from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.formats.grids import table
from quantkit.formats.layout import Integers, Linear, Table

F32 = np.float32
TRIALS = np.linspace(0.7, 1.15, 19, dtype=F32)  # of the scale at which the largest weight is exact


def code_values(fmt: type[Format]) -> npt.NDArray[np.float32]:
    """What each code of a format stands for, float32 (codes,)."""
    assert fmt.codes is not None
    if isinstance(fmt.values, Table):
        return np.array(fmt.values.entries, F32)
    assert isinstance(fmt.values, Linear)
    codes = np.arange(fmt.values.count or (2**fmt.codes.width if isinstance(fmt.codes, Integers) else 3))
    return (codes + lowest_code(fmt) - fmt.values.zero).astype(F32)


def lowest_code(fmt: type[Format]) -> int:
    """The code that the first entry of ``code_values`` belongs to: negative where codes are two's complement."""
    return -(2 ** (fmt.codes.width - 1)) if isinstance(fmt.codes, Integers) and fmt.codes.signed else 0


def nearest_index(x: np.ndarray, values: np.ndarray) -> npt.NDArray[np.int64]:
    """Index into ``values`` (any order) of the entry nearest to each x."""
    order = np.argsort(values, kind="stable")
    ladder = values[order]
    return order[np.searchsorted((ladder[1:] + ladder[:-1]) / 2, x)]


class NearestEncoder(Encoder):
    """Serves every format with one code for each weight."""

    method = "nearest"

    def writes(self, fmt: type[Format]) -> bool:
        """Whether the format keeps one code for each weight, with a scale and perhaps a minimum."""
        return fmt.codes is not None and isinstance(fmt.values, Linear | Table)

    def encode(self, weight, importance, fmt, *, moments=None, outputs=None, threads=None, name="tensor", at=(0,)):
        if not self.writes(fmt):
            raise FormatError(
                f"{name}: method nearest does not write {fmt.name}", hint="`quantkit formats` lists what can be written"
            )
        x = np.ascontiguousarray(weight, F32)
        row_bytes = fmt.row_bytes(x.shape[1])
        check_finite(x, name, at)
        qw = check_importance(importance, x.shape[1], name)
        groups = fmt.groups()
        shape = (-1, groups, fmt.elements // groups)
        w = np.broadcast_to(np.ones(x.shape[1], F32) if qw is None else qw, x.shape).reshape(shape)
        return encode_blocks(x.reshape(shape), w, fmt).reshape(len(x), row_bytes)


def encode_blocks(x: npt.NDArray[np.float32], w: npt.NDArray[np.float32], fmt: type[Format]) -> npt.NDArray[np.uint8]:
    """Blocks of weights (blocks, groups, size) with the weights of their squared errors → packed blocks."""
    values = code_values(fmt)
    scale, minimum = fit(x, w, values, has_minimum=fmt.block_minimum is not None, signed=_signed_scales(fmt))
    parts: dict[str, np.ndarray] = {}
    scale = _store_scales(scale, fmt, parts)
    if fmt.block_minimum is not None:
        minimum = _store_minimums(minimum, fmt, parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        target = np.where(scale[..., None] != 0, (x - minimum[..., None]) / scale[..., None], 0)
    codes = nearest_index(target, values).reshape(len(x), -1)
    parts["codes"] = codes + lowest_code(fmt)
    return fmt.pack(parts)


def fit(
    x: npt.NDArray[np.float32], w: npt.NDArray[np.float32], values: npt.NDArray[np.float32], has_minimum: bool, signed: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scale and minimum of every group, float32 (blocks, groups): the best of TRIALS by weighted squared error.

    signed: groups may have scales of either sign, so that the farther end of the values meets the largest weight.
    """
    if has_minimum:
        low, high = np.minimum(x.min(-1), 0), x.max(-1)
        start = (high - low) / (values.max() - values.min())
    elif not signed:
        low = np.zeros(x.shape[:-1], F32)
        start = x.max(-1) / values.max()
        if values.min() < 0:
            start = np.maximum(start, x.min(-1) / values.min())
    else:
        low = np.zeros(x.shape[:-1], F32)
        extreme = values[np.argmax(np.abs(values))]
        peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
        start = peak / extreme
    best = np.full(x.shape[:-1], np.inf)
    scale, minimum = start.astype(F32), low.astype(F32)
    for trial in TRIALS:
        s, m = start * trial, low
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            q = values[nearest_index(np.where(s[..., None] != 0, (x - m[..., None]) / s[..., None], 0), values)]
            s, m = _least_squares(x, w, q, low, has_minimum)
            error = (w * (s[..., None] * q + m[..., None] - x) ** 2).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        scale, minimum = np.where(better, s, scale).astype(F32), np.where(better, m, minimum).astype(F32)
    return scale, minimum


def scale_factors(fmt: type[Format]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The integers a group's scale can be, and what each multiplies the block's scale by."""
    assert fmt.scales is not None
    rule, width = fmt.scale_rule, fmt.scales.width
    integers = np.arange(2**width) - (2 ** (width - 1) if fmt.scales.signed else 0)
    return integers, (F32(rule.offset) + F32(rule.step) * integers.astype(F32)) * F32(rule.factor)


def _signed_scales(fmt: type[Format]) -> bool:
    if fmt.scale_table is not None:
        return False
    return fmt.scales is None or bool(scale_factors(fmt)[1].min() < 0)


def _least_squares(
    x: np.ndarray, w: np.ndarray, q: np.ndarray, low: np.ndarray, has_minimum: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of x ≈ s·q (+ m, at most 0) over each group; a degenerate group keeps its minimum."""
    sw, sq, sx = w.sum(-1), (w * q).sum(-1), (w * x).sum(-1)
    sqq, sqx = (w * q * q).sum(-1), (w * q * x).sum(-1)
    plain = np.where(sqq > 0, sqx / sqq, 0)
    if not has_minimum:
        return plain, np.zeros_like(plain)
    det = sw * sqq - sq * sq
    s, m = (sw * sqx - sq * sx) / det, (sqq * sx - sq * sqx) / det
    inside = (det > 0) & (m <= 0)
    return np.where(inside, s, plain), np.where(inside, m, np.where(det > 0, 0, low))


def _store_scales(scale: np.ndarray, fmt: type[Format], parts: dict[str, np.ndarray]) -> npt.NDArray[np.float32]:
    """Round scales as the format keeps them, add the stored parts, return what decoding will use."""
    if fmt.scale_table is not None:
        entries = table(fmt.scale_table)
        parts["scales"] = nearest_index(np.abs(scale), entries)
        return entries[parts["scales"]]
    if fmt.scales is None:
        d = _half(scale[:, 0])
        parts[_field(fmt)] = d
        return d.astype(F32)[:, None]
    integers, factors = scale_factors(fmt)
    peak = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)[:, 0]
    d = _half(peak / factors[np.argmax(np.abs(factors))])
    with np.errstate(divide="ignore", invalid="ignore"):
        chosen = nearest_index(np.where(d[:, None] != 0, scale / d.astype(F32)[:, None], 0), factors)
    parts["scales"] = integers[chosen]
    if isinstance(fmt.block_scale, Integers):
        pieces = np.arange(16 // fmt.block_scale.width) * fmt.block_scale.width
        parts["block_scale"] = (d.view(np.uint16).astype(np.int32)[:, None] >> pieces) & (2**fmt.block_scale.width - 1)
    else:
        parts[_field(fmt)] = d
    return d.astype(F32)[:, None] * factors[chosen]


def _store_minimums(minimum: np.ndarray, fmt: type[Format], parts: dict[str, np.ndarray]) -> npt.NDArray[np.float32]:
    """The same for minimums."""
    assert fmt.block_minimum is not None
    signed = fmt.minimum_sign * minimum
    if fmt.minimums is None:
        parts[fmt.block_minimum] = _half(signed[:, 0])
        return fmt.minimum_sign * parts[fmt.block_minimum].astype(F32)[:, None]
    top = 2**fmt.minimums.width - 1
    d = _half(signed.max(-1) / top)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(d[:, None] > 0, np.rint(signed / d.astype(F32)[:, None]), 0)
    parts["minimums"] = np.clip(codes, 0, top).astype(np.int64)
    parts[fmt.block_minimum] = d
    return fmt.minimum_sign * d.astype(F32)[:, None] * parts["minimums"].astype(F32)


def _field(fmt: type[Format]) -> str:
    assert isinstance(fmt.block_scale, str)
    return fmt.block_scale


def _half(x: np.ndarray) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return np.clip(x, -65504, 65504).astype(np.float16)
