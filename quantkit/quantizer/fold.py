"""``fold``: a model's own weights, moved between tensors so that they lose less when quantized.

What a norm or a linear map hands to the next one can be scaled channel by channel and put into another order without
changing the function (fold_groups.py). Large models have channels 10–100 times larger than others; their scale may
lie in the norm, the inputs or the weights, and blocks of weights that mix such channels lose the small ones. Here
every group of channels gets the scales, and if it helps the order, that the real encoders like best.

The scale of a channel is input^a / weight^(1-a), both as root mean square (AWQ, arXiv 2306.00978, has the largest
weight instead). With these measures the result does not depend on how the channels were scaled before: a hidden
rescaling is undone exactly, up to the powers of two that scales are rounded to.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.transformed import Change, Transform, TransformedCheckpoint
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.formats import Format, get_format
from quantkit.planning.standard import fallback
from quantkit.progress import Progress
from quantkit.quantizer.fold_groups import Group, Ints, Solution, groups_of, moved, transform_of
from quantkit.quantizer.fold_order import orders
from quantkit.quantizer.fold_sample import Sample, sample_of

SHARES = (0.125, 0.0, 0.25, 0.375, 0.5)  # of the input in a channel's scale; the first ones win ties
SCALE_TARGETS = ("Q4_K", "Q2_K")
ORDER_TARGETS = (*SCALE_TARGETS, "IQ3_S")
MARGIN = 0.8  # of the error that nothing done leaves: less is a win. Gains of 5–15 % did not show in the KL divergence
ORDER_MARGIN = 0.9  # the same for orders
TIE = 0.998  # of the best error so far: a later candidate must be better than that
LARGEST = 20  # exponent


def find_fold(checkpoint: Checkpoint, stats: ActivationStats | None, progress: Progress | None = None) -> Transform:
    """The scales and orders that leave the least error; what does not win clearly stays as it is.

    stats: of the checkpoint's own inputs; groups that they do not cover are judged by their weights alone. Reads a
    few rows of every matrix; the same input gives the same result.
    """
    groups = [group for group in groups_of(checkpoint) if group.readers]
    task = (progress or Progress()).task("find rescaling", total=len(groups), unit="groups")
    solutions = []
    for group in groups:
        solution = _solve(checkpoint, group, stats)
        if solution is not None:
            solutions.append(solution)
        task.advance()
    task.done()
    return transform_of(checkpoint, solutions)


def _solve(checkpoint: Checkpoint, group: Group, stats: ActivationStats | None) -> Solution | None:
    sample = sample_of(checkpoint, group, stats)
    if sample is None:
        return None
    columns = len(sample.channel)
    targets = _targets(SCALE_TARGETS, columns)
    if not targets:
        return None
    exponents = best_exponents(group, sample, targets)
    scaled = sample.changed(exponents)
    return Solution(group, exponents, best_order(group, scaled, _targets(ORDER_TARGETS, columns)))


def _targets(names: tuple[str, ...], columns: int) -> list[type[Format]]:
    """The formats of these names, or what llama.cpp takes where rows do not fit them."""
    found = dict.fromkeys(fallback(name, columns) for name in names)
    return [get_format(name) for name in found if get_format(name).is_quantized()]


def best_exponents(group: Group, sample: Sample, targets: list[type[Format]]) -> Ints:
    """Exponents of two by which columns grow, int32 (channels,); zeros if no candidate wins clearly."""
    nothing = np.zeros(group.channels, np.int32)
    known = {nothing.tobytes(): sample.loss(targets, group.name)}
    best, least = nothing, known[nothing.tobytes()] + math.log(MARGIN)
    for share in SHARES:
        found = exponents_by(sample, share)
        if found.tobytes() in known:
            continue
        loss = known[found.tobytes()] = sample.changed(found).loss(targets, group.name)
        if loss < least:
            best, least = found, loss + math.log(TIE)
    return best


def exponents_by(sample: Sample, share: float) -> Ints:
    """Exponents of input^share / weight^(1-share), int32 (channels,), so that half of them are 0 or more.

    What is common to all channels is chosen so that rounding moves them least: the circular mean of the fractions,
    which powers of two do not change.
    """
    inputs, weights = sample.sizes()
    dead = (inputs <= 0) | (weights <= 0)
    if dead.all():
        return np.zeros(len(dead), np.int32)
    logs = share * _log2(inputs) - (1 - share) * _log2(weights)
    common = np.angle(np.exp(2j * np.pi * logs[~dead]).sum()) / (2 * np.pi)
    steps = np.round(logs - common)
    steps -= np.floor(np.median(steps[~dead]))
    steps[dead] = 0
    return np.clip(steps, -LARGEST, LARGEST).astype(np.int32)


def _log2(squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Logarithm of the root."""
    return 0.5 * np.log2(np.maximum(squares, 1e-300))


def best_order(group: Group, sample: Sample, targets: list[type[Format]]) -> Ints | None:
    """Which old channel stands where, int32 (channels,); None if no order wins clearly."""
    found = orders(group, sample)
    if not found:
        return None
    member = group.readers[0]
    still = np.zeros(group.channels, np.int32)
    least, best = sample.loss(targets, group.name) + math.log(ORDER_MARGIN), None
    for order in found:
        loss = sample.changed(still, moved(member, order)).loss(targets, group.name)
        if loss < least:
            best, least = order, loss
    return best


def folded_stats(stats: ActivationStats, view: TransformedCheckpoint) -> ActivationStats:
    """Statistics of the source's inputs as those of the view's, without full second moments."""
    out = ActivationStats(datasets=stats.datasets, chunks=stats.chunks, chunk_size=stats.chunk_size, identity=view.identity)
    for name, entry in stats.tensors.items():
        change = view.transform.tensors.get(name)
        out.tensors[name] = entry if change is None else _moved(entry, change)
    return out


def _moved(entry: TensorStats, change: Change) -> TensorStats:
    """Statistics of columns that were changed."""

    def move(sums: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
        if sums is None:
            return None
        if change.column_order is not None:
            sums = np.take_along_axis(sums, np.broadcast_to(change.column_order, sums.shape), axis=1)
        if change.column_exponents is not None:
            sums = np.ldexp(sums, -2 * change.column_exponents)
        return sums.astype(np.float32)

    squares = move(entry.sum_squares)
    assert squares is not None
    return replace(entry, sum_squares=squares, borrowed_squares=move(entry.borrowed_squares))
