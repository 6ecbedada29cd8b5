"""Exact changes of a checkpoint, the groups they may touch, and the rescaling that is found again."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.transformed import Change, Transform, TransformedCheckpoint
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.errors import CheckpointError
from quantkit.formats import get_format
from quantkit.modeling.skeleton import materialized_model
from quantkit.modeling.text import TextEncoder
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer.fold import best_order, exponents_by, find_fold, folded_stats
from quantkit.quantizer.fold_groups import Group, Member, Solution, groups_of, moved, transform_of
from quantkit.quantizer.fold_sample import Sample, sample_of
from quantkit.quantizer.manifest import verify
from quantkit.quantizer.pipeline import run

FAMILIES = [*tiny.ARCHITECTURES, "qk-dense-6m", "qk-moe-11m"]


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tiny_folder):
    name = request.param
    return open_checkpoint(tiny.EXAMPLES / name if name.startswith("qk-") else tiny_folder(name))


def random_transform(checkpoint, *, scales=True, orders=True, seed=1):
    """Every group of the model with random exponents and orders."""
    rng = np.random.default_rng(seed)
    solutions = []
    for group in groups_of(checkpoint):
        exponents = rng.integers(-4, 5, group.channels) if scales else np.zeros(group.channels)
        order = None
        if group.run and orders:
            order = np.concatenate([at + rng.permutation(group.run) for at in range(0, group.channels, group.run)])
        solutions.append(Solution(group, exponents.astype(np.int32), None if order is None else order.astype(np.int32)))
    return transform_of(checkpoint, solutions)


def logits(checkpoint):
    with torch.inference_mode():
        return materialized_model(checkpoint)(torch.arange(3, 67)[None]).logits


def test_the_groups_of_every_family_leave_the_function_as_it_is(checkpoint):
    before = logits(checkpoint)
    scaled = TransformedCheckpoint(checkpoint, random_transform(checkpoint, orders=False))
    assert torch.equal(before, logits(scaled))
    both = TransformedCheckpoint(checkpoint, random_transform(checkpoint))
    assert (before - logits(both)).abs().max() <= 1e-5 * before.abs().max()
    changed = sum(not np.array_equal(checkpoint.read(name), both.read(name)) for name in both.transform.tensors)
    assert changed == len(both.transform.tensors) > 3 * checkpoint.n_layers


def test_a_gguf_of_the_view_is_the_same_model(tiny_folder, tmp_path):
    source = open_checkpoint(tiny_folder("qwen2_moe"))
    view = TransformedCheckpoint(source, random_transform(source))
    run(view, uniform_plan(view, "F32", None), tmp_path / "view.gguf")
    assert verify(tmp_path / "view.gguf").ok
    before = logits(source)
    assert (before - logits(open_checkpoint(tmp_path / "view.gguf"))).abs().max() <= 1e-5 * before.abs().max()


def test_rows_of_the_view_are_read_in_any_pieces(tiny_folder):
    source = open_checkpoint(tiny_folder("qwen3_moe"))
    transform = random_transform(source)
    view = TransformedCheckpoint(source, transform)
    for name, change in transform.tensors.items():
        info, old = source.info(name), source.read(name)
        old = old.reshape(info.experts, -1, info.columns)
        want = np.empty_like(old)
        for e in range(info.experts):
            rows = slice(None) if change.row_order is None else change.row_order[e]
            columns = slice(None) if change.column_order is None else change.column_order[e]
            up = 0 if change.row_exponents is None else change.row_exponents[e][:, None]
            across = 0 if change.column_exponents is None else change.column_exponents[e]
            want[e] = old[e][rows][:, columns] * 2.0 ** (up + across)
        want = want.reshape(info.rows, info.columns)
        assert np.array_equal(view.read(name).reshape(want.shape), want)
        if info.rows > 1:
            pieces = [view.read_rows(name, at, min(at + 7, info.rows)) for at in range(0, info.rows, 7)]
            assert np.array_equal(np.concatenate(pieces), want)


def test_a_transform_is_saved_and_read_back(tiny_folder, tmp_path):
    source = open_checkpoint(tiny_folder("qwen2"))
    transform = random_transform(source)
    transform.save(tmp_path / "fold.safetensors")
    back = Transform.load(tmp_path / "fold.safetensors")
    assert back.digest == transform.digest and back.identity == source.identity
    view, same = TransformedCheckpoint(source, transform), TransformedCheckpoint(source, back)
    other = TransformedCheckpoint(source, random_transform(source, seed=2))
    assert view.identity == same.identity and view.stamp == same.stamp
    assert len({view.identity, source.identity, other.identity}) == 3
    assert len({view.stamp, source.stamp, other.stamp}) == 3


def test_a_transform_that_does_not_fit_is_refused(tiny_folder, tmp_path):
    source = open_checkpoint(tiny_folder("qwen2"))
    norm = "blk.0.attn_norm.weight"
    short, twice, far = (np.zeros((1, 3), np.int32), np.zeros((1, 64), np.int32), np.full((1, 64), 99, np.int32))
    for change in (Change(column_exponents=short), Change(column_order=twice), Change(column_exponents=far)):
        with pytest.raises(CheckpointError, match="does not fit"):
            TransformedCheckpoint(source, Transform(source.identity, {norm: change}))
    with pytest.raises(CheckpointError, match="another model"):
        TransformedCheckpoint(source, Transform("0" * 16))
    with pytest.raises(CheckpointError, match="no tensor"):
        TransformedCheckpoint(source, Transform(source.identity, {"blk.9.attn_norm.weight": Change()}))
    with pytest.raises(CheckpointError, match="is not a transform"):
        Transform.load(tiny_folder("qwen2") / "model.safetensors")


@pytest.fixture(scope="module")
def known():
    """(checkpoint, its statistics) of the shipped dense model, on a little text."""
    checkpoint = open_checkpoint(tiny.DENSE)
    text = (tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text(encoding="utf-8")
    windows = np.array(TextEncoder(checkpoint).windows(text, 256)[:8], dtype=np.int64)
    return checkpoint, calibrate(checkpoint, CalibrationText(windows, windows, ("t",)), Progress()).stats


def outlier_twin(checkpoint, sign):
    """The same function with a twentieth of the channels of every group 8–128 times apart."""
    rng = np.random.default_rng(0)
    solutions = []
    for group in groups_of(checkpoint):
        far = rng.random(group.channels) < 0.05
        solutions.append(Solution(group, (sign * far * rng.integers(3, 8, group.channels)).astype(np.int32)))
    return TransformedCheckpoint(checkpoint, transform_of(checkpoint, solutions))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_rescaling_of_a_twin_is_found_again(known, sign):
    """Of the columns of every matrix at most a few end elsewhere than in the plain model, and none by more than a factor of 2."""
    checkpoint, stats = known
    twin = outlier_twin(checkpoint, sign)
    folded = TransformedCheckpoint(twin, find_fold(twin, folded_stats(stats, twin)))
    for name in ("blk.2.attn_q.weight", "blk.3.ffn_gate.weight", "blk.1.attn_output.weight", "blk.4.ffn_down.weight"):
        plain, back = (np.sqrt(np.square(c.read(name), dtype=np.float64).mean(0)) for c in (checkpoint, folded))
        steps = np.round(np.log2(back / plain)).astype(int)
        steps -= int(np.median(steps))
        limit = 0.35 if "ffn_down" in name else 0.02
        assert (steps != 0).mean() <= limit, name
        assert np.abs(steps).max() <= (4 if "ffn_down" in name else 1), name


def test_the_plain_model_and_its_twin_get_the_same_scales(known):
    checkpoint, stats = known
    twin = outlier_twin(checkpoint, 1)
    inputs = folded_stats(stats, twin)
    for group in groups_of(checkpoint):
        if not group.readers:
            continue
        plain, other = sample_of(checkpoint, group, stats), sample_of(twin, group, inputs)
        a, b = (s.changed(exponents_by(s, 0.25)).weights for s in (plain, other))
        peaks = [np.abs(x).max(1, keepdims=True) for x in (a, b)]
        assert np.array_equal(a / peaks[0], b / peaks[1]), group.name


def test_finding_twice_gives_the_same(known):
    checkpoint, stats = known
    twin = outlier_twin(checkpoint, -1)
    inputs = folded_stats(stats, twin)
    assert find_fold(twin, inputs).digest == find_fold(twin, inputs).digest
    assert find_fold(twin, None).digest == find_fold(twin, ActivationStats()).digest


def test_an_order_is_taken_where_it_wins():
    """Channels of two kinds, each large in other rows, alternate: sorted, blocks hold one kind only."""
    rng = np.random.default_rng(0)
    kind = np.arange(256) % 2
    sizes = np.where(kind == (np.arange(64) % 2)[:, None], 1.0, 0.3)
    channel = np.arange(256, dtype=np.int32)
    weights = (rng.standard_normal((64, 256)) * sizes).astype(np.float32)
    group = Group("ffn", 256, (Member("down", "columns", 1, channel),), run=256)
    sample = Sample(weights, np.ones(256), channel)
    order = best_order(group, sample, [get_format("Q4_K"), get_format("Q2_K")])
    assert order is not None
    assert sorted(set(kind[order[:128]])) == [kind[order[0]]]
    noise = Sample(rng.standard_normal((64, 256)).astype(np.float32), np.ones(256), channel)
    assert best_order(group, noise, [get_format("Q4_K"), get_format("Q2_K")]) is None


def test_orders_move_every_occurrence_of_a_channel_alike():
    """Value heads are read by several query heads: columns of o move within each head by the same order."""
    channel = np.array([0, 1, 0, 1, 2, 3, 2, 3], np.int32)
    member = Member("o", "columns", 1, channel)
    assert moved(member, np.array([1, 0, 2, 3], np.int32)).tolist() == [1, 0, 3, 2, 4, 5, 6, 7]


def test_statistics_follow_the_columns(known):
    checkpoint, _ = known
    name = "blk.0.ffn_down.weight"
    columns = checkpoint.info(name).columns
    sums = np.arange(1.0, columns + 1, dtype=np.float32)[None]
    view = TransformedCheckpoint(checkpoint, random_transform(checkpoint))
    change = view.transform.tensors[name]
    found = folded_stats(ActivationStats({name: TensorStats(sums, np.ones(1, np.float32))}), view)
    want = sums[0][change.column_order[0]] / 4.0 ** change.column_exponents[0]
    assert np.array_equal(found.tensors[name].sum_squares[0], want.astype(np.float32))
    assert found.identity == view.identity
