"""The curve of divergence against bytes, with llama-quantize's mixes as points on it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from click.testing import CliRunner

from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.probing import decoded
from quantkit.cli import main
from quantkit.errors import PlanError
from quantkit.planning import sweep as sweeping
from quantkit.planning.plot import sweep_figure
from quantkit.planning.policy import Policy
from quantkit.planning.speed import Rates
from quantkit.planning.standard import standard_plan
from quantkit.planning.sweep import Point, Sweep, judging_windows, make_sweep, measure_sweep


def quantkit(*arguments, ok=True):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code == 0) is ok, result.output + result.stderr
    return result


def test_the_curve_falls_and_the_mixes_lie_above(known):
    checkpoint, sensitivity, stats = known
    sweep = make_sweep(checkpoint, sensitivity, stats, Policy(), 3.0, 6.0, 4)
    curve, stock = sweep.of_kind("dynamic"), sweep.of_kind("stock")
    assert len(curve) == 4 and not any("clipped" in note for note in sweep.notes)
    for point, bpw in zip(curve, np.linspace(3, 6, 4), strict=True):
        assert bpw - 0.1 < point.bpw <= bpw + 1e-9
    klds = [p.predicted_kld for p in curve]
    assert klds == sorted(klds, reverse=True)
    assert all(3 <= p.bpw <= 6 for p in stock) and "Q4_K_M" in {p.name for p in stock}
    mix = next(p for p in stock if p.name == "Q4_K_M")
    plan = standard_plan(checkpoint, "Q4_K_M", stats)
    assert {n: f for n, (f, _) in mix.tensors.items()} == {n: e.format for n, e in plan.tensors.items()}
    assert all(a.tensors != b.tensors for a, b in itertools.combinations(stock, 2))
    assert all(c.kld_ratio is None or c.kld_ratio <= 1.02 for c in sweep.comparisons())


def test_sizes_that_cannot_be_had_are_clipped(known):
    checkpoint, sensitivity, stats = known
    sweep = make_sweep(checkpoint, sensitivity, stats, Policy(), 0.5, 30.0, 3)
    assert any("clipped" in note for note in sweep.notes)
    assert len(sweep.of_kind("dynamic")) == 3
    with pytest.raises(PlanError, match=r"sizes from [\d.]+ to [\d.]+ bpw can be had"):
        make_sweep(checkpoint, sensitivity, stats, Policy(), 0.1, 0.5)


def test_measured_numbers_are_those_of_the_decoded_weights(known):
    checkpoint, sensitivity, stats = known
    sweep = make_sweep(checkpoint, sensitivity, stats, Policy(), 4.0, 5.2, 2)
    sweep.points = [p for p in sweep.points if p.kind == "dynamic" or p.name == "Q4_K_M"]
    windows = np.random.default_rng(0).integers(3, 4000, (2, 64))
    measure_sweep(sweep, checkpoint, stats, windows, ["noise"])
    assert sweep.measured_tokens == 128 and sweep.measured_on == ["noise"]
    model = ProbeModel(checkpoint, windows)
    for point in sweep.points:
        quantized = {n: e for n, e in point.tensors.items() if checkpoint.info(n).quantizable}
        if point.kind == "stock":
            assert {method for _, method in quantized.values()} == {"ggml"}
        values = {n: decoded(checkpoint, stats, n, *entry) for n, entry in quantized.items()}
        assert point.measured_kld == pytest.approx(model.divergence(values), rel=1e-5)
        assert 0 < point.measured_error < point.measured_kld


def test_a_cache_without_room_changes_nothing(known, monkeypatch):
    checkpoint, sensitivity, stats = known
    sweep = make_sweep(checkpoint, sensitivity, stats, Policy(), 4.0, 4.2, 2)
    sweep.points = sweep.of_kind("dynamic")
    windows = np.random.default_rng(0).integers(3, 4000, (1, 32))
    measure_sweep(sweep, checkpoint, stats, windows, ["noise"])
    first = [p.measured_kld for p in sweep.points]
    original = sweeping._Values.__init__
    monkeypatch.setattr(sweeping._Values, "__init__", lambda self, c, s, room: original(self, c, s, 1))
    measure_sweep(sweep, checkpoint, stats, windows, ["noise"])
    assert [p.measured_kld for p in sweep.points] == pytest.approx(first)


def line(kind, name, nbytes, kld):
    return Point(name, kind, nbytes, 0.0, kld, {})


def test_comparisons_interpolate_logarithms():
    sweep = Sweep("m", "probes", [line("dynamic", "a", 100, 1.0), line("dynamic", "b", 200, 0.01), line("stock", "s", 150, 0.5),
                                  line("stock", "far", 300, 0.5), line("stock", "bad", 120, 2.0)])  # fmt: skip
    found = {c.name: c for c in sweep.comparisons()}
    assert found["s"].kld_ratio == pytest.approx(0.1 / 0.5)
    assert found["s"].bytes_ratio == pytest.approx((100 + 100 * np.log(0.5) / np.log(0.01)) / 150)
    assert found["far"].kld_ratio is None and found["bad"].bytes_ratio is None
    sweep.points[2].measured_kld = 0.2
    assert {c.name: c.kld_ratio for c in sweep.comparisons()}["s"] == pytest.approx(0.1 / 0.2)


def test_the_picture_shows_every_point():
    sweep = Sweep("m", "probes", [line("dynamic", "a", 100, 1.0), line("dynamic", "b", 200, 0.0), line("stock", "s", 150, 0.5)])
    axes = sweep_figure(sweep).axes[0]
    assert axes.get_yscale() == "log" and {t.get_text() for t in axes.texts} == {"s"}
    assert len(axes.lines) == 2 and len(axes.lines[0].get_xdata()) == 2
    sweep.measured_on = ["t"]
    assert len(sweep_figure(sweep).axes[0].lines) == 3


def test_windows_to_judge_on(analyzed, known, tmp_path):
    checkpoint, text = known[0], analyzed[2]
    windows, names = judging_windows(checkpoint, [text], None, 8192, 256)
    assert windows.size <= 256 and names == [text.name]
    aside, names = judging_windows(checkpoint, [], [text], 8192, 1024)
    assert aside.shape[1] == 512 and len(aside) <= 2 and "set aside" in names[0]


def test_speed_is_a_second_constraint(known):
    checkpoint, sensitivity, stats = known
    rates = Rates(
        {name: 1e9 / bpw for name, bpw in (("Q2_K", 2.6), ("Q4_K", 4.5), ("Q8_0", 8.5), ("BF16", 16))}, machine="a test"
    )
    free = make_sweep(checkpoint, sensitivity, stats, Policy(patterns=("Q?_K", "Q8_0")), 3.0, 8.0, 3, rates=rates)
    speeds = [p.tokens_per_second for p in free.of_kind("dynamic")]
    assert free.speed_measured_on == "rates of a test"
    least = 1e9 / 8 / sum(i.size for i in checkpoint.tensors.values())
    sweep = make_sweep(checkpoint, sensitivity, stats, Policy(), 3.0, 8.0, 3, rates=rates, least_speed=least)
    assert all(p.tokens_per_second >= least * (1 - 1e-9) for p in sweep.of_kind("dynamic")) and len(speeds) == 3
    with pytest.raises(PlanError, match="tokens/s is not possible"):
        make_sweep(checkpoint, sensitivity, stats, Policy(), 3.0, 8.0, 3, rates=rates, least_speed=1e12)


def test_the_command(at_home):
    folder, options, home = at_home
    (home / "rates.json").write_text(json.dumps({"Q4_K": 1e9, "Q8_0": 6e8, "Q6_K": 7e8, "Q2_K": 2e9, "Q3_K": 1.5e9}))
    text = quantkit("sweep", folder, *options, "--from", "3", "--to", "6", "--steps", "3").stdout
    assert "Q4_K_M" in text and "predicted KLD" in text and "--measure" in text and "at the bytes of Q4_K_M" in text
    assert (home / "work" / "sweep.png").read_bytes().startswith(b"\x89PNG") and (home / "work" / "sweep.json").exists()
    measured = quantkit(
        "sweep", folder, *options, "--from", "4", "--to", "5", "--steps", "2", "--measure", "--limit", "512", "-o", "c.png",
        "--json", "c.json", "--rates", "rates.json",
    ).stdout  # fmt: skip
    assert "measured KLD" in measured and "tokens/s" in measured and (home / "c.png").exists()
    data = json.loads((home / "c.json").read_text())
    assert data["measured_tokens"] == 512 and all(p["measured_kld"] > 0 for p in data["points"])
    printed = json.loads(quantkit("sweep", folder, *options, "--from", "4", "--to", "4", "--json", "-").stdout)
    assert len([p for p in printed["points"] if p["kind"] == "dynamic"]) == 1


MISTAKES = [
    (["--from", "5", "--to", "3"], "is no range"),
    (["--from", "0"], "is no range"),
    (["--text", "x.txt"], "add --measure"),
    (["--measure", "--text", "missing.txt"], "missing.txt"),
    (["-o", "no/such/curve.png"], "does not exist"),
    (["--keep", "nothing=Q8_0"], "matches no tensor"),
    (["--from", "0.1", "--to", "0.2"], "can be had"),
    (["--rates", "missing.json"], "cannot read"),
    (["--rates", "empty.json"], "not valid JSON"),
    (["--min-tokens-per-second", "-3"], "out of range"),
    (["--min-tokens-per-second", "1e12", "--rates", "rates.json"], "is not possible"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_mistakes_get_one_line(arguments, words, at_home):
    folder, options, home = at_home
    (home / "empty.json").write_text("")
    (home / "rates.json").write_text('{"Q4_K": 1e9, "Q8_0": 1e9, "BF16": 1e9}')
    message = quantkit("sweep", folder, *options, *arguments, ok=False).stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_a_model_that_is_too_large_to_measure_says_so(at_home, monkeypatch):
    folder, options, _ = at_home
    monkeypatch.setattr(sweeping, "physical_memory", lambda: 1 << 20)
    message = quantkit("sweep", folder, *options, "--measure", ok=False).stderr
    assert "too large to measure" in message and "quantkit compare" in message


def test_a_sweep_reads_back_as_it_was_written(tmp_path):
    points = [
        Point("p", "dynamic", 3, 4.0, 0.2, {"a": ("Q4_K", "search")}, 0.1, 0.01, 9.0),
        Point("Q4_K_M", "stock", 5, 4.5, 0.05, {}),
    ]
    sweep = Sweep("m", "probes", points, ["a note"], ["text"], 128, "a machine")
    (tmp_path / "sweep.json").write_text(sweep.to_json())
    assert Sweep.read(tmp_path / "sweep.json") == sweep
