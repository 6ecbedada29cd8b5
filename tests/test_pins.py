"""Pins: a super weight survives in every format that can hold it, and a planted model lives by that."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.superweights import find_super_weights
from quantkit.analysis.texts import CalibrationText
from quantkit.checkpoint import open_checkpoint
from quantkit.encoders import default_method, get_encoder
from quantkit.encoders.pins import KEPT, pin, survival
from quantkit.errors import FormatError, PlanError
from quantkit.formats import formats, get_format
from quantkit.planning.plan import Plan
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer import pipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import super_weights as bench

QUANTIZED = [f.name for f in formats() if f.is_quantized()]
NO_SCALE = ("MXFP4", "NVFP4")  # scales from a table: a weight between its steps cannot be exact
ONE_SIZE = ("Q1_0", "Q2_0", "TQ1_0", "TQ2_0")  # one magnitude for a block: kept only where the block allows it
AT = [(1, 300), (3, 5)]


def rows(name: str, crowd: float, seed: int = 0):
    """A format, weights (4, 512) with two scalars among weights of rms ``crowd``, importance and packed rows."""
    rng = np.random.default_rng(seed)
    weight = (0.05 * rng.standard_normal((4, 512))).astype(np.float32)
    importance = rng.gamma(1, 1, 512).astype(np.float32)
    for row, column in AT:
        start = column // 32 * 32
        weight[row, start : start + 32] = crowd * rng.standard_normal(32)
        weight[row, column] = 1.37 * (-1) ** (row // 2)
        importance[column] = 1000
    fmt = get_format(name)
    return fmt, weight, importance, get_encoder(default_method(fmt)).encode(weight, importance, fmt)


@pytest.mark.parametrize("crowd", [0.05, 1.0, 2.5])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_scalar_survives_and_the_rest_of_its_block_is_not_sold_for_it(name, crowd):
    fmt, weight, importance, packed = rows(name, crowd)
    kept = pin(weight, packed, fmt, importance, AT)
    before, after = survival(weight, packed, fmt, AT), survival(weight, kept, fmt, AT)
    assert (after <= np.maximum(before, KEPT)).all()
    if name not in (*NO_SCALE, *ONE_SIZE):
        assert after.max() <= KEPT
    rest = np.broadcast_to(importance, weight.shape).copy()
    rest[tuple(np.array(AT).T)] = 0
    error = [float((rest * (fmt.decode(p) - weight) ** 2).sum()) for p in (packed, kept)]
    assert error[1] <= max(error[0], float((rest * weight**2).sum()))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_pay_little_for_it(name):
    """The scalar becomes exact and the rest of a crowded block loses at most half as much again."""
    errors, losses = [], np.zeros(2)
    for seed in range(4):
        fmt, weight, importance, packed = rows(name, 1.0, seed)
        kept = pin(weight, packed, fmt, importance, AT)
        rest = np.broadcast_to(importance, weight.shape).copy()
        rest[tuple(np.array(AT).T)] = 0
        losses += [float((rest * (fmt.decode(p) - weight) ** 2).sum()) for p in (packed, kept)]
        errors.append([survival(weight, p, fmt, AT).max() for p in (packed, kept)])
    assert np.max(errors, 0)[0] > KEPT and np.max(errors, 0)[1] <= KEPT
    assert losses[1] <= 1.5 * losses[0]


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "IQ3_S"])
def test_only_blocks_with_a_pin_change_and_the_input_does_not(name):
    fmt, weight, importance, packed = rows(name, 1.0)
    original = packed.copy()
    kept = pin(weight, packed, fmt, importance, AT)
    assert np.array_equal(packed, original) and kept is not packed
    changed = {tuple(map(int, at)) for at in np.argwhere((kept != packed).reshape(4, 512 // fmt.elements, -1).any(-1))}
    assert changed <= {(row, column // fmt.elements) for row, column in AT}
    assert np.array_equal(kept, pin(weight, packed, fmt, importance, reversed(AT)))
    assert np.array_equal(pin(weight, packed, fmt, importance, []), packed)


def test_two_pins_of_one_block_and_no_importance():
    fmt, weight, _, _ = rows("Q6_K", 0.3)
    at = [(1, 300), (1, 310)]
    weight[1, 310] = -0.9
    kept = pin(weight, get_encoder("ggml").encode(weight, None, fmt), fmt, None, at)
    assert survival(weight, kept, fmt, at).max() < 0.01


def test_unquantized_rows_zeros_and_wrong_places():
    fmt, weight, importance, packed = rows("Q4_K", 0.05)
    weight[1, 300] = 0
    assert np.isfinite(fmt.decode(pin(weight, packed, fmt, importance, AT))).all()
    half = get_format("F16")
    assert np.array_equal(
        pin(weight, get_encoder("ggml").encode(weight, None, half), half, None, AT),
        get_encoder("ggml").encode(weight, None, half),
    )
    with pytest.raises(FormatError, match="no weight at 4, 5: it is 4 × 512"):
        pin(weight, packed, fmt, importance, [(4, 5)])


def test_a_planted_super_weight_collapses_and_is_rescued(tmp_path):
    """Among larger weights the search loses it; the pin brings it back in the same bytes."""
    text = (tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()
    windows = bench.windows_of(open_checkpoint(tiny.DENSE), [text], 6)
    fit, dev = windows[:4], windows[4:]
    planted = bench.plant(tiny.DENSE, tmp_path / "planted", fit, crowded=True)
    checkpoint = open_checkpoint(tmp_path / "planted")
    calibration = calibrate(checkpoint, CalibrationText(fit, dev, ("text",)), Progress())
    found = [(w["tensor"], w["row"], w["column"]) for w in find_super_weights(checkpoint, calibration.facts)]
    assert found[0] == (planted.tensor, planted.row, planted.column)
    judge, weight = bench.Judge(checkpoint, dev), checkpoint.read(planted.tensor)
    whole = judge.score({})["perplexity"]
    shipped = bench.Judge(open_checkpoint(tiny.DENSE), dev).score({})["perplexity"]
    assert whole < 1.4 * shipped
    assert judge.score({planted.tensor: bench.zeroed(checkpoint, planted)})["perplexity"] > 10 * whole
    fmt = get_format("Q3_K")
    packed = get_encoder("ggml").encode(weight, None, fmt)
    kept = pin(weight, packed, fmt, None, [(planted.row, planted.column)])
    lost, rescued = (judge.score({planted.tensor: fmt.decode(p)}) for p in (packed, kept))
    assert survival(weight, kept, fmt, [(planted.row, planted.column)])[0] <= KEPT
    assert rescued["kld"] < 0.5 * lost["kld"]


def test_a_plan_with_pins_keeps_them_in_the_file(tmp_path):
    """Through plan.json and the pipeline, in a row of any slice; without statistics, so that the search would lose it."""
    checkpoint = open_checkpoint(tiny.DENSE)
    name = "blk.1.ffn_down.weight"
    weight = checkpoint.read(name)
    least = np.unravel_index(np.abs(weight).argsort(axis=None)[weight.size // 3], weight.shape)
    at = (int(least[0]), int(least[1]))
    plan = uniform_plan(checkpoint, "Q3_K", None)
    plain = pipeline.encode_all(checkpoint, plan, None, tmp_path / "cache")
    plan.tensors[name] = replace(plan.tensors[name], pins=(at,))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    read = Plan.read(path)
    assert read.tensors == plan.tensors
    assert '"pins"' not in path.read_text().replace(f'"pins": [[{at[0]}, {at[1]}]]', "")
    pipeline.run(checkpoint, read, tmp_path / "pinned.gguf", cache=tmp_path / "cache")
    fmt = get_format("Q3_K")
    back = open_checkpoint(tmp_path / "pinned.gguf").read(name)
    before = fmt.decode(plain[name])
    assert abs(back[at] / weight[at] - 1) <= KEPT < abs(before[at] / weight[at] - 1)
    assert ((back != before).any(1) == (np.arange(len(back)) == at[0])).all()


@pytest.mark.parametrize(
    ("pins", "words"), [([[400, 0]], "no weight 400, 0"), ([[0]], "misses or misnames"), ([["a", 1]], "pairs of row")]
)
def test_bad_pins_are_refused(pins, words, tmp_path):
    checkpoint = open_checkpoint(tiny.DENSE)
    plan = uniform_plan(checkpoint, "Q3_K", None)
    name = "blk.1.ffn_down.weight"
    data = json.loads(plan.to_json())
    data["tensors"][name]["pins"] = pins
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=words):
        Plan.read(tmp_path / "plan.json").check(checkpoint)
