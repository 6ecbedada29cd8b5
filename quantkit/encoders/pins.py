"""Pins: single weights that must survive (super weights). The blocks that hold them are encoded once more.

Works on the bytes of any method. For a block with a pinned weight many encodings are tried: ggml's search with the
pinned column's importance raised, and fits in which the weight is itself a code: the block's scale (or minimum) is
solved for each pair of a code and a group's scale, everything else in the block is rounded to it again. The best
is the one that keeps the pinned weight and, of those, loses least of the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.encoders.base import check_importance
from quantkit.encoders.ggml import GgmlEncoder
from quantkit.encoders.nearest import NearestEncoder, code_values, lowest_code, nearest_index, scale_factors
from quantkit.errors import FormatError
from quantkit.formats import Format
from quantkit.formats.grids import table
from quantkit.formats.layout import Integers, Linear, Table

F32 = np.float32
KEPT = 1e-3  # relative error up to which a pinned weight counts as kept; the block's loss decides among those
RAISES = 10.0 ** np.arange(1, 8)  # of the pinned column's importance
TRIED = 48  # solutions of one block that are worked out completely
HALF = 65504.0

Bytes = npt.NDArray[np.uint8]
Parts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Block:
    """One block: weights and importance, float32 (elements,), and the positions of its pins, int64 (pins,)."""

    x: npt.NDArray[np.float32]
    importance: npt.NDArray[np.float32]
    pins: npt.NDArray[np.int64]

    def pin_error(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Largest relative error of the pins for each row of values (n, elements)."""
        exact = self.x[self.pins].astype(np.float64)
        return (np.abs(values[:, self.pins] - exact) / np.maximum(np.abs(exact), 1e-30)).max(1)

    def loss(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Importance-weighted squared error of all weights but the pins, for each row of values."""
        weight = self.importance.astype(np.float64)
        weight[self.pins] = 0
        return (values.astype(np.float64) - self.x) ** 2 @ weight


def pin(
    weight: npt.NDArray[np.float32],
    packed: Bytes,
    fmt: type[Format],
    importance: npt.NDArray[np.float32] | None,
    pins: Iterable[tuple[int, int]],
    name: str = "tensor",
) -> Bytes:
    """Packed rows in which the pinned weights come back as exactly as the format allows.

    weight: float32 (rows, columns); packed: uint8 (rows, bytes per row) of any method; importance: float32
    (columns,), the mean square of each input channel, or None; pins: (row, column). Returns a copy; only blocks
    with a pin differ. A block stays as it is where no encoding keeps the pin without losing the rest.
    Raises FormatError if a pin lies outside the matrix.
    """
    rows, columns = weight.shape
    out = packed.copy()
    if not fmt.is_quantized():
        return out
    qw = check_importance(importance, columns, name)
    held: dict[tuple[int, int], list[int]] = {}
    for row, column in sorted(set(pins)):
        if not (0 <= row < rows and 0 <= column < columns):
            raise FormatError(f"{name} has no weight at {row}, {column}: it is {rows} × {columns}", hint="analyze it again")
        held.setdefault((row, column // fmt.elements), []).append(column % fmt.elements)
    for (row, number), positions in held.items():
        part = slice(number * fmt.elements, (number + 1) * fmt.elements)
        own = np.ones(fmt.elements, F32) if qw is None or not qw[part].any() else qw[part]
        block = Block(np.ascontiguousarray(weight[row, part], F32), own, np.array(positions))
        place = slice(number * fmt.block_bytes(), (number + 1) * fmt.block_bytes())
        out[row, place] = encode_block(block, out[row, place], fmt, name)
    return out


def survival(
    weight: npt.NDArray[np.float32], packed: Bytes, fmt: type[Format], pins: Iterable[tuple[int, int]]
) -> npt.NDArray[np.float64]:
    """Relative error of each weight in ``pins`` after decoding, float64 (pins,)."""
    at = np.array(list(pins), np.int64).reshape(-1, 2)
    rows, place = np.unique(at[:, 0], return_inverse=True)
    back = fmt.decode(packed[rows])[place, at[:, 1]].astype(np.float64)
    exact = weight[at[:, 0], at[:, 1]].astype(np.float64)
    return np.abs(back - exact) / np.maximum(np.abs(exact), 1e-30)


def encode_block(block: Block, packed: Bytes, fmt: type[Format], name: str = "tensor") -> Bytes:
    """The best encoding found of a block now packed as ``packed``: uint8 (bytes,)."""
    bases = np.unique(np.concatenate([packed[None], _raised(block, fmt, name)]), axis=0)
    found = [packed[None], bases]
    coded = fmt.codes is not None and isinstance(fmt.values, Linear | Table)
    for base in bases:
        for position in block.pins:
            if block.x[position] == 0:
                continue
            found += _solve_scale(block, base, int(position), fmt) if coded else _stretch(block, base, int(position), fmt)
            if coded and fmt.block_minimum is not None:
                found += _solve_minimum(block, base, int(position), fmt)
    return _best(block, np.concatenate(found), fmt)


def _best(block: Block, found: Bytes, fmt: type[Format]) -> Bytes:
    """Of encodings (n, bytes), the first being the present one: smallest class of pin error, then smallest loss.

    What loses more of the rest than the present one and than no rest at all (zeros) is out.
    """
    values = fmt.decode(found)
    error, loss = block.pin_error(values), block.loss(values)
    worst = max(loss[0], block.loss(np.zeros_like(values[:1]))[0])
    with np.errstate(invalid="ignore"):
        steps = np.ceil(np.log2(np.maximum(error, KEPT) / KEPT))  # octaves above KEPT
    steps[~(np.isfinite(values).all(1) & (loss <= worst))] = np.inf
    plain = ((values.astype(np.float64) - block.x) ** 2).sum(1)
    return found[np.lexsort((error, plain, loss, steps))[0]]


def _raised(block: Block, fmt: type[Format], name: str) -> Bytes:
    """The search on this block alone with the pins' importance raised: uint8 (len(RAISES), bytes)."""
    encoder = GgmlEncoder() if fmt.name in GgmlEncoder.serves else NearestEncoder()
    if not encoder.writes(fmt):
        return np.empty((0, fmt.block_bytes()), np.uint8)
    out = []
    for factor in RAISES:
        weighted = block.importance.copy()
        weighted[block.pins] = np.maximum(weighted[block.pins], weighted.mean()) * F32(factor)
        out.append(encoder.encode(block.x[None], weighted, fmt, threads=1, name=name))
    return np.concatenate(out)


@np.errstate(over="ignore", invalid="ignore")  # a table of scales may hold ones that are far too large
def _solve_scale(block: Block, base: Bytes, position: int, fmt: type[Format]) -> list[Bytes]:
    """Encodings in which scale · code + minimum is the pinned weight, from the scales and minimums of ``base``."""
    parts, records = fmt.unpack(base[None]), fmt.blocks(base[None])
    values, (integers, factors) = code_values(fmt), _group_scales(fmt)
    scale, minimum = fmt.block_scales(records)[0], fmt.block_minimums(records)[0]
    group = position // (fmt.elements // fmt.groups())
    target = block.x[position] - minimum[group]
    f, v = (a.reshape(-1) for a in np.meshgrid(np.arange(len(factors)), values[values != 0], indexing="ij"))
    f, v = f[factors[f] != 0], v[factors[f] != 0]
    d = np.ones(len(f), F32) if fmt.scale_table else _half(target / (factors[f] * v)).astype(F32)
    error = np.abs(d * factors[f] * v - target) / abs(block.x[position])
    good = np.flatnonzero(d != 0)
    if not len(good):
        return []
    order = factors[np.argsort(factors, kind="stable")]
    near = np.searchsorted((order[1:] + order[:-1]) / 2, scale / d[good, None])
    chosen = np.argsort(factors, kind="stable")[near]
    chosen[:, group] = f[good]
    codes = values[parts["codes"][0] - lowest_code(fmt)].reshape(fmt.groups(), -1).astype(np.float64)
    energy = (block.importance.reshape(codes.shape) * codes**2).sum(1)
    moved = (d[good, None] * factors[chosen] - scale) ** 2 @ energy  # the loss if the codes stayed
    pick = np.lexsort((moved, np.ceil(np.log2(np.maximum(error[good], KEPT) / KEPT))))[:TRIED]
    d, chosen = d[good][pick], chosen[pick]
    out = []
    for step in (0, -1, 1):
        trial = np.clip(chosen + step, 0, len(factors) - 1)
        trial[:, group] = chosen[:, group]
        new = {key: np.repeat(value, len(d), 0) for key, value in parts.items()}
        if fmt.scale_table is None:
            _set_scale(new, d, fmt)
        if fmt.scales is not None:
            new["scales"] = integers[trial]
        out.append(_with_codes(block, new, d[:, None] * factors[trial], np.repeat(minimum[None], len(d), 0), fmt))
    return _mixed(block, out, fmt)


def _solve_minimum(block: Block, base: Bytes, position: int, fmt: type[Format]) -> list[Bytes]:
    """The same with the block's minimum solved and the scales kept."""
    parts, records = fmt.unpack(base[None]), fmt.blocks(base[None])
    scale, minimum = fmt.block_scales(records)[0], fmt.block_minimums(records)[0]
    group = position // (fmt.elements // fmt.groups())
    top = 1 if fmt.minimums is None else 2**fmt.minimums.width - 1
    n, v = (a.reshape(-1) for a in np.meshgrid(np.arange(1, top + 1), code_values(fmt), indexing="ij"))
    d = _half(fmt.minimum_sign * (block.x[position] - scale[group] * v) / n.astype(F32)).astype(F32)
    n, d = n[d != 0], d[d != 0]
    if not len(d):
        return []
    near = np.clip(np.rint(fmt.minimum_sign * minimum / d[:, None]), 0, top).astype(np.int64)
    near[:, group] = n
    moved = (fmt.minimum_sign * d[:, None] * near - minimum) ** 2 @ block.importance.reshape(fmt.groups(), -1).sum(1)
    pick = np.argsort(moved, kind="stable")[:TRIED]
    d, near = d[pick], near[pick]
    new = {key: np.repeat(value, len(d), 0) for key, value in parts.items()}
    assert fmt.block_minimum is not None
    new[fmt.block_minimum] = d.astype(np.float16)
    if fmt.minimums is not None:
        new["minimums"] = near
    return [_with_codes(block, new, np.repeat(scale[None], len(d), 0), fmt.minimum_sign * d[:, None] * near, fmt)]


def _stretch(block: Block, base: Bytes, position: int, fmt: type[Format]) -> list[Bytes]:
    """``base`` with its block scale changed so that the pinned weight is exact; codes stay, other groups' scales follow."""
    if fmt.scale_table is not None or fmt.block_minimum is not None:
        return []
    back = fmt.decode(base[None])[0, position]
    parts, records = fmt.unpack(base[None]), fmt.blocks(base[None])
    scale, (integers, factors) = fmt.block_scales(records), _group_scales(fmt)
    group = position // (fmt.elements // fmt.groups())
    own = factors[0] if fmt.scales is None else factors[np.flatnonzero(integers == parts["scales"][0, group])[0]]
    if back == 0 or own == 0:
        return []
    target = scale[0, group] * block.x[position] / back
    usable = np.flatnonzero((factors != 0) & (np.abs(target) < HALF * np.abs(factors)))
    d = _half(target / factors[usable]).astype(F32)
    usable, d = usable[d != 0], d[d != 0]
    if not len(d):
        return []
    near = nearest_index(scale / d[:, None], factors)
    near[:, group] = usable
    new = {key: np.repeat(value, len(d), 0) for key, value in parts.items()}
    _set_scale(new, d, fmt)
    if fmt.scales is not None:
        new["scales"] = integers[near]
    return [fmt.pack(new)]


def _with_codes(block: Block, parts: Parts, scale: np.ndarray, minimum: np.ndarray, fmt: type[Format]) -> Bytes:
    """Pack with the codes nearest to the weights; scale, minimum: float32 (n, groups)."""
    x = block.x.reshape(1, fmt.groups(), -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        target = np.where(scale[..., None] != 0, (x - minimum[..., None]) / scale[..., None], 0)
    parts["codes"] = nearest_index(target, code_values(fmt)).reshape(len(scale), -1) + lowest_code(fmt)
    return fmt.pack(parts)


def _mixed(block: Block, found: list[Bytes], fmt: type[Format]) -> list[Bytes]:
    """Encodings with equal block scales (each uint8 (n, bytes)), and those that take every group from the best of them."""
    if fmt.groups() == 1:
        return found[:1]
    losses = []
    for some in found:
        error = (fmt.decode(some).astype(np.float64) - block.x) ** 2 * block.importance
        losses.append(error.reshape(len(some), fmt.groups(), -1).sum(-1))
    best = np.argmin(losses, 0)
    unpacked = [fmt.unpack(some) for some in found]
    parts = dict(unpacked[0])
    for key in ("scales", "codes"):
        each = np.stack([u[key].reshape(*best.shape, -1) for u in unpacked])
        parts[key] = np.take_along_axis(each, best[None, :, :, None], 0)[0].reshape(unpacked[0][key].shape)
    return [found[0], fmt.pack(parts)]


def _group_scales(fmt: type[Format]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The integers a group's scale can be and what each multiplies the block's scale by (1 where there is none)."""
    if fmt.scale_table is not None:
        entries = table(fmt.scale_table).astype(F32)
        return np.arange(len(entries)), np.where(np.isfinite(entries), entries, F32(0))
    if fmt.scales is None:
        return np.zeros(1, np.int64), np.ones(1, F32)
    return scale_factors(fmt)


def _set_scale(parts: Parts, d: np.ndarray, fmt: type[Format]) -> None:
    """Store block scales, float32 (n,) that half precision holds."""
    halves = d.astype(np.float16)
    if isinstance(fmt.block_scale, Integers):
        width = fmt.block_scale.width
        places = width * np.arange(16 // width)
        parts["block_scale"] = (halves.view(np.uint16).astype(np.int32)[:, None] >> places) & (2**width - 1)
    else:
        assert fmt.block_scale is not None
        parts[fmt.block_scale] = halves


def _half(x: np.ndarray) -> npt.NDArray[np.float16]:
    """Rounded to half precision; what does not fit becomes 0 and is left out by the callers."""
    return np.where(np.abs(x) < HALF, x, 0).astype(np.float16)
