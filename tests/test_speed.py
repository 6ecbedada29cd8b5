"""Rates of a machine, predicted speed, and speed as a second constraint."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantkit.analysis.imatrix import read_imatrix
from quantkit.analysis.run import ANALYSIS, IMATRIX
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Role, open_checkpoint
from quantkit.cli import main
from quantkit.errors import MissingDependencyError, PlanError
from quantkit.formats import formats, get_format
from quantkit.planning import rates as measuring
from quantkit.planning.dynamic import dynamic_plan
from quantkit.planning.policy import Policy
from quantkit.planning.solver import Choice, TooSlowError, fastest, solve_knapsack, undominated
from quantkit.planning.speed import Clock, Rates, SpeedRequest, touched_weights
from quantkit.planning.standard import standard_plan, uniform_plan

# Twice as fast at half the bits, but for code books, which are slow: as on real machines.
SPEEDS = {f.name: 1e9 * (4 if f.name.startswith("IQ") else 32) / f.bpw() for f in formats()}


def random_groups(seed, n_groups, n_choices):
    rng = np.random.default_rng(seed)
    return [
        [Choice(f"{g}.{c}", int(32 * rng.integers(1, 60)), float(rng.gamma(0.5, 1.0)), float(rng.gamma(2.0, 1e-3))) for c in range(n_choices)]
        for g in range(n_groups)
    ]  # fmt: skip


def total(chosen, attribute):
    return sum(getattr(c, attribute) for c in chosen)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_two_limits_are_kept_and_the_optimum_is_found(seed, n_groups, n_choices, bytes_at, seconds_at):
    groups = random_groups(seed, n_groups, n_choices)
    low, high = (sum(f(c.nbytes for c in g) for g in groups) for f in (min, max))
    budget = int(low + bytes_at * (high - low))
    fitting = [combo for combo in itertools.product(*groups) if total(combo, "nbytes") <= budget]
    times = [total(combo, "seconds") for combo in fitting]
    assert total(fastest(groups, budget), "seconds") <= min(times) * (1 + 1e-4)
    limit = min(times) + seconds_at * (max(times) - min(times))
    assume(limit > min(times) * (1 + 1e-4))
    chosen = solve_knapsack(groups, budget, limit)
    assert all(c in g for c, g in zip(chosen, groups, strict=True))
    assert total(chosen, "nbytes") <= budget and total(chosen, "seconds") <= limit * (1 + 1e-9)
    quick = [total(combo, "cost") for combo, t in zip(fitting, times, strict=True) if t <= limit * (1 - 1e-5)]
    assert not quick or total(chosen, "cost") <= min(quick) * (1 + 1e-4) + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30))
def test_only_dominated_choices_are_dropped(seed, count):
    choices = random_groups(seed, 1, count)[0]
    for timed in (False, True):
        kept = undominated(choices, timed)
        for choice in choices:
            below = [
                k
                for k in kept
                if k.nbytes <= choice.nbytes and k.cost <= choice.cost and (not timed or k.seconds <= choice.seconds)
            ]
            assert below, choice
        assert all(a.cost > b.cost for a, b in itertools.pairwise(kept)) or timed


def test_too_slow_says_what_the_fastest_takes():
    groups = [[Choice("small and slow", 32, 1.0, 3.0), Choice("large and fast", 64, 0.5, 1.0)]]
    assert solve_knapsack(groups, 64, 1.0)[0].label == "large and fast"
    with pytest.raises(TooSlowError) as caught:
        solve_knapsack(groups, 63, 2.0)
    assert caught.value.seconds == 3.0


@pytest.fixture(scope="module")
def known(analyzed):
    folder, work, _ = analyzed
    return open_checkpoint(folder), Sensitivity.read(work / ANALYSIS), read_imatrix(work / IMATRIX)


def test_touched_weights(known, tiny_folder):
    checkpoint = known[0]
    by_name = {info.name: touched_weights(info, checkpoint) for info in checkpoint.tensors.values()}
    expert = checkpoint.info("blk.0.ffn_up_exps.weight")
    assert by_name[expert.name] == expert.size * checkpoint.config["num_experts_per_tok"] / checkpoint.config["num_experts"]
    assert by_name["blk.0.attn_q.weight"] == checkpoint.info("blk.0.attn_q.weight").size
    assert by_name["token_embd.weight"] == checkpoint.info("token_embd.weight").columns
    assert by_name["output.weight"] == checkpoint.info("output.weight").size
    tied = open_checkpoint(tiny_folder("qwen2"))
    embedding = tied.info("token_embd.weight")
    assert touched_weights(embedding, tied) == embedding.size + embedding.columns


def test_the_prediction_is_the_sum_it_says(known):
    checkpoint = known[0]
    rates = Rates(SPEEDS, {"Q8_0": 1.0}, cache_bytes=10, seconds_per_node=1e-6)
    plan = uniform_plan(checkpoint, "Q8_0", None)
    seconds = 0.0
    for info in checkpoint.tensors.values():
        if info.quantizable:
            seconds += touched_weights(info, checkpoint) / SPEEDS["Q8_0"]
        else:
            seconds += info.size / SPEEDS["F32"]
    clock = Clock(checkpoint, rates, 1000)
    without = Clock(checkpoint, Rates(SPEEDS), 1000)
    assert without.tokens_per_second(checkpoint, plan) == pytest.approx(1 / seconds)
    assert 1 / clock.tokens_per_second(checkpoint, plan) > seconds + 20e-6  # at least ten nodes a layer
    assert rates.of_size(10) == {"Q8_0": 1.0} and rates.of_size(11) == SPEEDS
    assert Clock(checkpoint, Rates({"Q4_K": 1e9}), 1000).tokens_per_second(checkpoint, plan) is None


def test_a_plan_reaches_the_speed_or_says_what_can_be_had(known):
    checkpoint, sensitivity, stats = known
    rates = Rates(SPEEDS, machine="a test")
    size = standard_plan(checkpoint, "Q3_K_M", stats).file_bytes
    free = dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), rates=rates)
    speed = free.budget["tokens_per_second"]
    assert not any("tokens/s" in line for line in free.constraints)
    wanted = 1.2 * speed
    fast = dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), rates=rates, least_speed=wanted)
    assert fast.budget["tokens_per_second"] >= wanted * (1 - 1e-9) and fast.file_bytes <= size
    assert fast.predicted_kld >= free.predicted_kld
    assert fast.budget["min_tokens_per_second"] == wanted and any("rates of a test" in line for line in fast.constraints)
    with pytest.raises(PlanError, match=r"not possible in [\d,]+ bytes: the fastest plan .* decodes [\d.]+ tokens/s") as caught:
        dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), rates=rates, least_speed=1e9)
    most = float(str(caught.value).split("decodes ")[1].split()[0])
    dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), rates=rates, least_speed=0.999 * most)


def test_only_formats_with_a_rate_are_chosen(known):
    checkpoint, sensitivity, stats = known
    rates = Rates({"Q4_K": 1e9, "Q8_0": 5e8})
    size = standard_plan(checkpoint, "Q6_K", stats).file_bytes
    plan = dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), rates=rates, least_speed=1)
    assert {plan.tensors[i.name].format for i in checkpoint.tensors.values() if i.quantizable} <= {"Q4_K", "Q8_0"}
    with pytest.raises(PlanError, match="no rate is known for any format"):
        policy = Policy(floors=dict.fromkeys(Role, "F16"))
        dynamic_plan(checkpoint, sensitivity, stats, 10 * size, policy, rates=rates, least_speed=1)


def test_rates_on_disk(tmp_path):
    path = tmp_path / "rates.json"
    rates = Rates({"Q4_K": 1e9}, {"Q4_K": 2e9}, 100, 1e-6, "m", "r", 2)
    path.write_text(rates.to_json())
    assert Rates.read(path) == rates and rates.describe() == "r, 2 threads"
    path.write_text('{"Q4_K": 1.5e9}')
    assert Rates.read(path).weights_per_second == {"Q4_K": 1.5e9} and Rates.read(path).describe() == "rates of rates.json"
    for text, words in (
        ("{", "not valid JSON"), ("[1]", "no rates"), ("{}", "there is none"), ('{"Q4_K": 0}', "Q4_K"), ('{"Q99": 1}', "unknown format"),
        ('{"Q4_K": "fast"}', "no rates"), ('{"quantkit_rates": 9, "Q4_K": 1}', "another version"),
        ('{"weights_per_second": {"Q4_K": 1}, "speed": 3}', "speed"), ('{"weights_per_second": 7}', "no rates"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PlanError, match=words):
            Rates.read(path)
    with pytest.raises(PlanError, match="cannot read"):
        Rates.read(tmp_path / "missing.json")
    for least in (0, -1, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="out of range"):
            SpeedRequest(least)


def test_without_the_runtime_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependencyError, match=r"llama-cpp-python; .*\[llama\].*--rates FILE"):
        measuring.rates_of_this_machine(1)
    result = CliRunner().invoke(main, ["plan", str(tiny.DENSE), "--min-tokens-per-second", "10"])
    assert (
        result.exit_code == 1 and result.stderr.startswith("error: measuring speed needs") and "\n" not in result.stderr.strip()
    )


def test_measuring_gives_plausible_rates(monkeypatch, tmp_path):
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "formats", lambda: [get_format(n) for n in ("F16", "Q8_0", "Q4_K", "IQ3_S")])
    monkeypatch.setattr(measuring, "LARGE", measuring.SMALL)
    found = measuring.rates_of_this_machine(1)
    assert set(found.weights_per_second) == {"F16", "Q8_0", "Q4_K", "IQ3_S"} == set(found.cached)
    assert all(1e7 < rate < 1e13 for rate in found.weights_per_second.values())
    assert 0 < found.seconds_per_node < 1e-2 and 0 < found.cpu_share <= 1 and found.threads == 1
    kept = list(tmp_path.glob("speed-*.json"))
    assert len(kept) == (found.cpu_share >= measuring.QUIET)
    for path in kept:  # what is kept is used, what is damaged is measured again
        monkeypatch.setattr(measuring, "measure_rates", lambda *a: pytest.fail("measured again"))
        assert measuring.rates_of_this_machine(1) == found
        monkeypatch.setattr(measuring, "measure_rates", lambda *a: found)
        path.write_text("{")
        assert measuring.rates_of_this_machine(1) == found and json.loads(path.read_text())["threads"] == 1


def test_the_command_prints_what_rates_reads(monkeypatch, tmp_path):
    given_rates = Rates({"Q4_K": 1e9}, {"Q4_K": 2e9}, 100, 1e-6, "m", "r", 2, cpu_share=0.5)
    monkeypatch.setattr(measuring, "rates_of_this_machine", lambda *a: given_rates)
    result = CliRunner().invoke(main, ["speed"])
    assert result.exit_code == 0 and "Q4_K" in result.stdout and "the machine was busy" in result.stderr
    path = tmp_path / "r.json"
    path.write_text(CliRunner().invoke(main, ["speed", "--json"]).stdout)
    assert Rates.read(path) == given_rates
