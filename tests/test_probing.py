"""Measuring instead of estimating: which probes are chosen, neighbours, and groups of models that are too large."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from quantkit.analysis import group_probes, neighbours, probe_choice, run
from quantkit.analysis.errors import decode_after_encode
from quantkit.analysis.predict import fill_all, fill_predictions
from quantkit.analysis.probe_choice import choose_probes, probe_values
from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.probing import probe_groups
from quantkit.analysis.run import analyze
from quantkit.analysis.sensitivity import FormatCost, Sensitivity, TensorSensitivity
from quantkit.analysis.texts import load_calibration
from quantkit.analysis.windows import LARGE_TOKENS, spread
from quantkit.checkpoint import open_checkpoint
from quantkit.formats import get_format
from quantkit.progress import Progress


def tensor(role, scale, formats=("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0"), shape=(64, 256)):
    """Costs that fall by a factor of 4 with every bit."""
    costs = {
        f: FormatCost(0.0, 0.0, scale * 4 ** -get_format(f).bpw(), search_kld=scale * 4 ** -get_format(f).bpw()) for f in formats
    }
    return TensorSensitivity(role, 0, shape, 3.0, 0, costs)


def document(tensors):
    fill_all(tensors.values())
    return Sensitivity("m", "llama", "x", "probes", {}, tensors)


@pytest.fixture
def small(analyzed):
    """(checkpoint, its analysis) of the tiny mixture of experts, estimates only."""
    folder, work, _ = analyzed
    sensitivity = Sensitivity.read(work / run.ANALYSIS)
    for entry in sensitivity.tensors.values():
        for cost in entry.formats.values():
            cost.probe_kld = None
    fill_all(sensitivity.tensors.values())
    return open_checkpoint(folder), sensitivity


def test_a_small_model_gets_every_probe_and_a_larger_one_the_most_valuable(small, monkeypatch):
    checkpoint, sensitivity = small
    everything = choose_probes(checkpoint, sensitivity, 1024, run_sizes())
    assert len(everything) > 3 * len(sensitivity.tensors)
    monkeypatch.setattr(probe_choice, "WORK", 20 * 1024 * checkpoint.n_weights)
    some = choose_probes(checkpoint, sensitivity, 1024, run_sizes())
    assert len(some) == 20 and set(some) < set(everything) and some == [probe for probe in everything if probe in some]
    values = probe_values(checkpoint, sensitivity, run_sizes())
    assert min(values.get(p, 0.0) for p in some) >= max(values.get(p, 0.0) for p in everything if p not in some)


def run_sizes():
    return (2.8, 4.25)


def test_a_probe_is_worth_what_a_wrong_estimate_would_lose(small):
    """Against the definition: of a tensor with one format nothing can be lost; cost that cannot matter is worth least."""
    checkpoint, sensitivity = small
    values = probe_values(checkpoint, sensitivity, (4.25,))
    assert all(value >= 0 for value in values.values()) and max(values.values()) > 0
    name = max(values, key=values.get)[0]
    cheap = Sensitivity(**{**sensitivity.__dict__, "tensors": dict(sensitivity.tensors)})
    entry = sensitivity.tensors[name]
    one = {"Q4_K": entry.formats["Q4_K"]} if "Q4_K" in entry.formats else dict([next(iter(entry.formats.items()))])
    cheap.tensors[name] = TensorSensitivity(**{**entry.__dict__, "formats": one})
    assert all(value == 0 for (n, _), value in probe_values(checkpoint, cheap, (4.25,)).items() if n == name)


def test_tensors_without_probes_go_by_those_of_their_role():
    tensors = {"a": tensor("attn_q", 1.0), "b": tensor("attn_q", 2.0), "c": tensor("ffn_up", 1.0), "d": tensor("ffn_down", 1.0)}
    tensors["a"].formats["Q4_K"].probe_kld = 3 * tensors["a"].formats["Q4_K"].fisher_kld
    tensors["c"].formats["Q4_K"].probe_kld = tensors["c"].formats["Q4_K"].fisher_kld / 3
    fill_all(tensors.values())
    ratio = {n: t.formats["Q3_K"].predicted_kld / t.formats["Q3_K"].fisher_kld for n, t in tensors.items()}
    assert ratio == pytest.approx({"a": 3, "b": 3, "c": 1 / 3, "d": 1})  # d: the mean of both, in logarithms
    fill_predictions(tensors["d"], [(1.0, 2.0)])
    assert tensors["d"].formats["Q3_K"].predicted_kld == pytest.approx(2 * tensors["d"].formats["Q3_K"].fisher_kld)


def test_neighbours_follow_each_other_and_are_measured_together(small):
    checkpoint, sensitivity = small
    pairs = neighbours.neighbours(checkpoint, list(sensitivity.tensors))
    assert ("blk.0.attn_q.weight", "blk.0.attn_k.weight") in pairs
    assert ("blk.0.ffn_down_shexp.weight", "blk.1.attn_q.weight") in pairs
    for entry in sensitivity.tensors.values():
        entry.formats["Q4_K" if "Q4_K" in entry.formats else "Q4_0"].probe_kld = 1.0
    asked = []

    def divergence(values):
        asked.append(tuple(values))
        return 3.0

    found = neighbours.measure_neighbours(checkpoint, sensitivity, "Q4_K", divergence, lambda n, f: (n, f), Progress())
    assert asked == [(p["first"], p["second"]) for p in found] and found and all(p["together"] == 3.0 for p in found)
    rows = neighbours.neighbour_rows({n: t.role for n, t in sensitivity.tensors.items()}, found)
    assert all(row[2].startswith("1.50") for row in rows)


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), "qwen2_moe"])
def test_groups_measured_block_by_block_are_what_the_whole_model_says(name, tiny_folder, tmp_path):
    """Tied head and lookup (dense), routed experts (qwen2_moe): every group equals the probe of the same tensors."""
    checkpoint = open_checkpoint(tiny.DENSE if name == "dense" else tiny_folder(name))
    text = load_calibration(checkpoint, [tiny.EXAMPLES.parent / "text" / "tinystories.txt"], 4096)
    sensitivity, stats = analyze(
        checkpoint, tmp_path, calibration=[tiny.EXAMPLES.parent / "text" / "tinystories.txt"], tokens=4096, probes=False
    )
    windows = spread(text.dev, LARGE_TOKENS)
    groups, whole = group_probes.measure_groups(checkpoint, stats, sensitivity.tensors, windows, Progress())
    fitting = {n for n in sensitivity.tensors if checkpoint.info(n).columns % 32 == 0}
    assert {t for g in groups for t in g.tensors} == fitting == set(whole[0].tensors) == set(whole[1].tensors)
    model = ProbeModel(checkpoint, windows)
    for group in [groups[0], groups[-1], groups[len(groups) // 2], *whole]:
        values = {}
        for n, fmt in group.tensors.items():
            info = checkpoint.info(n)
            weights = checkpoint.read(n).reshape(info.experts, -1, info.columns)
            values[n] = np.stack(
                [decode_after_encode(weights[e], stats.importance(n, e), get_format(fmt), n) for e in range(info.experts)]
            ).reshape(info.shape)
        assert group.measured == pytest.approx(model.divergence(values), rel=2e-3), group.role
    assert whole[0].measured > whole[1].measured > 0


@pytest.mark.slow
def test_groups_bring_estimates_nearer_to_probes(tmp_path):
    """On the trained mixture of experts, where small errors make tokens take other experts."""
    checkpoint = open_checkpoint(tiny.MOE)
    text = [tiny.EXAMPLES.parent / "text" / "tinystories.txt"]
    sensitivity, stats = analyze(checkpoint, tmp_path, calibration=text, tokens=16384)
    probes = {(n, f): c.probe_kld for n, t in sensitivity.tensors.items() for f, c in t.formats.items() if c.probe_kld}
    for name, fmt in probes:
        sensitivity.tensors[name].formats[fmt].probe_kld = None
    probe_groups(checkpoint, stats, sensitivity, load_calibration(checkpoint, text, 16384), Progress())

    def off(field, fmt):
        costs = {n: getattr(sensitivity.tensors[n].formats[fmt], field) for n, f in probes if f == fmt}
        return np.median(np.abs([np.log(cost / probes[n, fmt]) for n, cost in costs.items()]))

    for fmt in ("IQ2_S", "Q4_K", "Q6_K"):
        assert off("predicted_kld", fmt) < 0.7 * off("fisher_kld", fmt), fmt


def test_a_large_model_is_predicted_from_groups(analyzed, tmp_path, monkeypatch):
    """The tiny model, treated as too large to probe: predictions go through what its groups were measured to cost."""
    folder, _, text = analyzed
    monkeypatch.setattr(run, "PROBE_WEIGHTS", 1000)
    analyze(open_checkpoint(folder), tmp_path, calibration=[text], tokens=4096)
    read = Sensitivity.read(tmp_path / run.ANALYSIS)
    assert read.estimator == "groups" and read.groups[-1]["role"] == "all" and read.composition != (1.0, 1.0)
    for name, tensor in read.tensors.items():
        mine = [g for g in read.groups[:-2] if name in g["tensors"]]
        if not mine:
            continue  # rows that no format of the groups fits
        ratios = [min(max(g["measured"] / g["estimated"], 1 / group_probes.MOST), group_probes.MOST) for g in mine]
        shares = [c.predicted_kld / c.fisher_kld for c in tensor.formats.values() if c.fisher_kld > 0]
        assert len(mine) == 2 and max(shares) <= 1.001 * max(ratios), name
        coarsest = min(tensor.formats, key=lambda f: get_format(f).bpw())  # no coarser format bounds its prediction
        cost = tensor.formats[coarsest]
        assert cost.predicted_kld >= 0.999 * min(ratios) * cost.fisher_kld > 0, name
