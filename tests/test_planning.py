"""Knapsack, policies, budgets and the plan file."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.analysis.imatrix import read_imatrix
from quantkit.analysis.run import ANALYSIS, IMATRIX
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Role, open_checkpoint
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.planning.artifact import planned_bytes
from quantkit.planning.budget import Request, budget_bytes, parse_size
from quantkit.planning.dynamic import dynamic_plan
from quantkit.planning.plan import Assignment, Plan
from quantkit.planning.policy import Keep, Policy
from quantkit.planning.solver import Choice, solve_knapsack
from quantkit.planning.standard import standard_plan, uniform_plan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1))
def test_the_knapsack_is_solved_exactly(seed, n_groups, n_choices, tightness):
    rng = np.random.default_rng(seed)
    groups = [
        [Choice(f"{g}.{c}", int(32 * rng.integers(1, 60)), float(rng.gamma(0.5, 1.0))) for c in range(n_choices)]
        for g in range(n_groups)
    ]
    low, high = (sum(f(c.nbytes for c in g) for g in groups) for f in (min, max))
    budget = int(low + tightness * (high - low))
    chosen = solve_knapsack(groups, budget)
    assert [c in g for c, g in zip(chosen, groups, strict=True)] == [True] * n_groups
    assert sum(c.nbytes for c in chosen) <= budget
    best = min(sum(c.cost for c in combo) for combo in itertools.product(*groups) if sum(c.nbytes for c in combo) <= budget)
    assert sum(c.cost for c in chosen) <= best * (1 + 1e-4) + 1e-12


def test_the_knapsack_says_what_is_possible():
    with pytest.raises(PlanError, match="smallest possible 64"):
        solve_knapsack([[Choice("a", 64, 1.0)]], 63)


@pytest.fixture(scope="module")
def known(analyzed):
    folder, work, _ = analyzed
    return open_checkpoint(folder), Sensitivity.read(work / ANALYSIS), read_imatrix(work / IMATRIX)


def sizes(known):
    checkpoint, _, stats = known
    return [standard_plan(checkpoint, mix, stats).file_bytes for mix in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K")]


def test_never_over_the_budget_and_close_to_it(known):
    checkpoint, sensitivity, stats = known
    for size in sizes(known):
        plan = dynamic_plan(checkpoint, sensitivity, stats, size, Policy())
        assert plan.file_bytes == planned_bytes(checkpoint, plan, stats) <= size
        if plan.file_bytes < 0.999 * size:  # then no single step up fits
            left = size - plan.file_bytes
            for name, entry in plan.tensors.items():
                info = checkpoint.info(name)
                if info.quantizable:
                    from quantkit.analysis.errors import offered_formats

                    steps = [f.row_bytes(info.columns) * info.rows for f in offered_formats(info)]
                    now = next(f.row_bytes(info.columns) * info.rows for f in offered_formats(info) if f.name == entry.format)
                    assert all(step <= now or step - now > left - 64 for step in steps)


def test_more_bytes_never_predict_worse(known):
    checkpoint, sensitivity, stats = known
    plans = [dynamic_plan(checkpoint, sensitivity, stats, size, Policy()) for size in sizes(known)]
    costs = [plan.predicted_kld for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert all(entry.reason for plan in plans for entry in plan.tensors.values())


def test_impossible_budgets_say_the_range(known):
    checkpoint, sensitivity, stats = known
    with pytest.raises(PlanError, match=r"sizes from [\d,]+ bytes \([\d.]+ bpw\) to [\d,]+ bytes"):
        dynamic_plan(checkpoint, sensitivity, stats, 1000, Policy())


def test_policies_are_kept(known):
    checkpoint, sensitivity, stats = known
    size = sizes(known)[1]
    policy = Policy(
        keeps=[Keep.parse(r"blk\.0\.attn_v=Q8_0"), Keep.parse("attn_v=Q6_K")],
        floors={Role.SHARED_UP: "Q5_K"}, super_weights={"blk.1.ffn_down_shexp.weight": ((5, 7),)}, fused=True,
    )  # fmt: skip
    plan = dynamic_plan(checkpoint, sensitivity, stats, size, policy)
    formats = {name: entry.format for name, entry in plan.tensors.items()}
    assert formats["blk.0.attn_v.weight"] == "Q8_0" or formats["blk.0.attn_q.weight"] == formats["blk.0.attn_v.weight"]
    assert get_format(formats["blk.1.ffn_down_shexp.weight"]).bpw() >= get_format("Q4_K").bpw()
    assert plan.tensors["blk.1.ffn_down_shexp.weight"].pins == ((5, 7),)
    assert formats["blk.0.ffn_up_shexp.weight"] not in ("Q2_K", "Q3_K", "Q4_K")
    assert formats["blk.1.ffn_gate_exps.weight"] == formats["blk.1.ffn_up_exps.weight"]
    assert any("super weight" in line for line in plan.constraints)


@pytest.mark.parametrize(
    ("text", "words"), [("attn_v", "regex=FORMAT"), ("(=Q8_0", "regular expression"), ("x=Q99", "unknown format")]
)
def test_bad_keeps(text, words):
    with pytest.raises(Exception, match=words):
        Keep.parse(text)


def test_a_keep_that_matches_nothing(known):
    checkpoint, sensitivity, stats = known
    with pytest.raises(PlanError, match="matches no tensor"):
        dynamic_plan(checkpoint, sensitivity, stats, sizes(known)[2], Policy(keeps=[Keep.parse("nothing=Q8_0")]))


@pytest.mark.parametrize(
    ("text", "size"),
    [("4.2GiB", int(4.2 * 2**30)), ("700MB", 700_000_000), ("3781472", 3781472), ("1 KiB", 1024), ("2g", 2 << 30)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 parsecs", "-3GB", "1e9", "0"])
def test_bad_sizes(text):
    with pytest.raises(PlanError):
        parse_size(text)


def test_requests(known, tmp_path):
    checkpoint, sensitivity, stats = known
    with pytest.raises(PlanError, match="exclude each other"):
        Request(bpw=4, size="1GB")
    with pytest.raises(PlanError, match="out of range"):
        Request(bpw=-1)
    with pytest.raises(PlanError, match="neither a standard mix nor a file"):
        budget_bytes(Request(like="Q77"), checkpoint, stats)
    with pytest.raises(PlanError, match="KV cache"):
        budget_bytes(Request(fit="100KB"), checkpoint, stats)
    (tmp_path / "f.gguf").write_bytes(bytes(5000))
    assert budget_bytes(Request(like=str(tmp_path / "f.gguf")), checkpoint, stats)[0] == 5000
    size, _ = budget_bytes(Request(bpw=4.5), checkpoint, stats)
    assert dynamic_plan(checkpoint, sensitivity, stats, size, Policy()).bpw <= 4.5


def test_plan_files(known, tmp_path):
    checkpoint, sensitivity, stats = known
    plan = dynamic_plan(checkpoint, sensitivity, stats, sizes(known)[2], Policy())
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    again = Plan.read(path)
    assert again == plan
    again.check(checkpoint)
    data = json.loads(path.read_text())
    name = "blk.0.attn_q.weight"

    def broken(change):
        copy = json.loads(json.dumps(data))
        change(copy)
        path.write_text(json.dumps(copy))
        Plan.read(path).check(checkpoint)

    data["tensors"][name] = "Q8_0"  # the short form people type
    path.write_text(json.dumps(data))
    assert Plan.read(path).tensors[name] == Assignment("Q8_0")
    for change, words in (
        (lambda d: d["tensors"].update({name: "Q7_K"}), "blk.0.attn_q.weight.*unknown format"),
        (lambda d: d["tensors"].update({"blk.9.x": "Q8_0"}), "does not have"),
        (lambda d: d["tensors"].pop(name), "does not say"),
        (lambda d: d.update(identity="0" * 16), "another model"),
        (lambda d: d["tensors"].update({name: {"format": "Q4_K", "method": "magic"}}), "unknown method"),
        (lambda d: d["tensors"].update({"output_norm.weight": "Q4_K"}), "output_norm.weight"),
        (lambda d: d.pop("label"), "misses or misnames"),
        (lambda d: d.update(quantkit_plan=9), "not a plan of this version"),
    ):
        with pytest.raises(PlanError, match=words):
            broken(change)
    path.write_text("{")
    with pytest.raises(PlanError, match="not valid JSON"):
        Plan.read(path)


def test_rows_that_no_super_block_fits_get_legacy_formats(tiny_folder, tmp_path):
    from quantkit.analysis.run import analyze

    text = tmp_path / "t.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:12000])
    checkpoint = open_checkpoint(tiny_folder("qwen3"))
    sensitivity, stats = analyze(checkpoint, tmp_path / "work", calibration=[text], tokens=2048)
    size, _ = budget_bytes(Request(bpw=5.5), checkpoint, stats)
    plan = dynamic_plan(checkpoint, sensitivity, stats, size, Policy())
    assert all(get_format(e.format).elements <= 64 for e in plan.tensors.values())


def test_formats_can_be_restricted(analyzed, tmp_path):
    folder, work, _ = analyzed
    checkpoint, sensitivity = open_checkpoint(folder), Sensitivity.read(work / ANALYSIS)
    stats = read_imatrix(work / IMATRIX)
    size, _ = budget_bytes(Request(bpw=4.5), checkpoint, stats)
    plan = dynamic_plan(checkpoint, sensitivity, stats, size, Policy(patterns=("q?_k", "Q8_0")))
    assert {e.format for e in plan.tensors.values()} <= {"F32", "F16", "BF16", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert any("only formats like" in rule for rule in plan.constraints)
    with pytest.raises(PlanError, match="--formats 'Z\\*' matches no format"):
        dynamic_plan(checkpoint, sensitivity, stats, size, Policy(patterns=("Z*",)))


def test_a_format_that_needs_statistics_is_refused_without(analyzed):
    folder, work, _ = analyzed
    checkpoint = open_checkpoint(folder)
    stats = read_imatrix(work / IMATRIX)
    plan = uniform_plan(checkpoint, "IQ2_XS", stats)
    assert (
        plan.tensors["token_embd.weight"].format == "IQ2_S"
        and "needs activation statistics" in plan.tensors["token_embd.weight"].reason
    )
    plan.check_importance(stats)
    with pytest.raises(PlanError, match="there are no activation statistics for it"):
        plan.check_importance(None)
    name = next(n for n, e in plan.tensors.items() if e.format == "IQ2_XS" and checkpoint.info(n).experts > 1)
    stats.tensors[name].counts[1] = 0
    with pytest.raises(PlanError, match=rf"{name} cannot become IQ2_XS: no calibration token reached experts \[1\]"):
        plan.check_importance(stats)
