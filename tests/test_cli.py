"""The command line as users type it: results, JSON, and one line for every mistake."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.cli import COMMANDS, main
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run as write


def quantkit(*arguments, ok=True):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code == 0) is ok, result.output + result.stderr
    return result


def test_help_and_version_name_every_command():
    text = quantkit("--help").output
    assert all(name in text for name in COMMANDS)
    assert "quantkit 0." in quantkit("--version").output
    for name in COMMANDS:
        assert "Usage:" in quantkit(name, "--help").output


def test_formats():
    rows = json.loads(quantkit("formats", "--json").output)["formats"]
    assert {"name": "Q4_K", "bpw": 4.5}.items() <= next(r for r in rows if r["name"] == "Q4_K").items()
    assert "Q6_K" in quantkit("formats").output


def test_inspect():
    out = json.loads(quantkit("inspect", tiny.MOE, "--json").output)
    assert (out["architecture"] == "qwen2moe" and out["weights"] == 10_764_544) or out["weights"] > 10_000_000
    roles = {row["name"]: row["role"] for row in out["tensors"]}
    assert roles["blk.0.ffn_up_exps.weight"] == "expert_up" and roles["blk.0.ffn_gate_inp.weight"] == "router"
    assert "blk.0.attn_v.weight" in quantkit("inspect", tiny.MOE, "--tensor", "blk.0.attn_v.weight").output


def test_the_whole_way(at_home):
    folder, options, home = at_home
    analysis = json.loads(quantkit("analyze", folder, *options, "--json").output)
    assert analysis["estimator"] == "probes"
    assert "predicted KLD" in quantkit("analyze", folder, *options).output
    plan = json.loads(quantkit("plan", folder, *options, "--bpw", "4", "--json").output)
    assert plan["bpw"] <= 4 and (home / "work" / "plan.json").exists()
    out = json.loads(quantkit("quantize", folder, *options, "--json").output)
    made = home / out["output"]
    assert made.exists() and made.name.endswith("Q4_K_M.gguf") and "dynamic" in made.name
    stock = quantkit("quantize", folder, "Q4_K_M", *options, "-o", "stock.gguf").output
    assert "bpw" in stock and made.stat().st_size <= (home / "stock.gguf").stat().st_size
    assert "as written" in quantkit("verify", made).output
    why = json.loads(quantkit("inspect", made, "--json").output)
    assert any("predicted KLD" in (row["why"] or "") for row in why["tensors"])
    report = quantkit("compare", folder, made, home / "stock.gguf", "--limit", "1024", "-o", "r.html", "--json").output
    assert len(json.loads(report)["candidates"]) == 2 and (home / "r.html").exists()
    edited = quantkit("quantize", folder, *options, "--plan", "work/plan.json", "-o", "edited.gguf").output
    assert "edited.gguf" in edited


def test_a_second_plan_reuses_the_analysis(at_home, monkeypatch):
    folder, options, _ = at_home
    import quantkit.session as api

    monkeypatch.setattr(api, "run_analysis", lambda *a, **k: pytest.fail("analyzed again"))
    for bpw in ("3.5", "5"):
        quantkit("plan", folder, *options, "--bpw", bpw)


def test_fit_prints_what_it_counts(at_home):
    folder, options, _ = at_home
    text = quantkit("plan", folder, *options, "--fit", "24MiB", "--context", "2048").output
    assert "KV cache (F16)" in text and "compute" in text


MISTAKES = [
    (["inspect", "nothing"], "nothing does not exist"),
    (["quantize", "{m}", "Q9_K"], "unknown plan 'Q9_K'"),
    (["quantize", "{m}", "--plan", "standard:Q9_K"], "known mixes"),
    (["quantize", "{m}", "--plan", "uniform:Q9"], "unknown format"),
    (["quantize", "{m}", "--plan", "missing.json"], "unknown plan"),
    (["quantize", "{m}", "Q4_K_M", "--bpw", "4"], "has its own size"),
    (["quantize", "{m}", "Q4_K_M", "--plan", "dynamic"], "both"),
    (["quantize", "{m}", "Q4_K_M", "-o", "no/such/x.gguf"], "does not exist"),
    (["quantize", "{m}", "Q4_K_M", "-o", "exists.gguf"], "--force"),
    (["quantize", "{m}", "Q4_K_M", "--imatrix", "exists.gguf"], "imatrix"),
    (["plan", "{m}", "{o}", "--bpw", "0.1"], "sizes from"),
    (["plan", "{m}", "{o}", "--bpw", "4", "--size", "1GB"], "exclude each other"),
    (["plan", "{m}", "{o}", "--size", "seven"], "is not a size"),
    (["plan", "{m}", "{o}", "--fit", "1KB"], "KV cache"),
    (["plan", "{m}", "{o}", "--fit", "1GB", "--kv-type", "Q3"], "KV cache type"),
    (["plan", "{m}", "{o}", "--keep", "attn_v"], "regex=FORMAT"),
    (["plan", "{m}", "{o}", "--like", "Q77"], "neither a standard mix nor a file"),
    (["analyze", "{m}", "--calibration", "missing.txt"], "missing.txt"),
    (["analyze", "{m}", "--calibration", "empty.txt", "--work", "w2"], "no text"),
    (["analyze", "{m}", "--work", "foreign"], "another model"),
    (["verify", "exists.gguf"], "not a GGUF"),
    (["compare", "{m}", "exists.gguf"], "not a GGUF"),
    (["compare", "{m}", "{m}", "--text", "empty.txt"], "no text"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else None)
def test_mistakes_get_one_line(arguments, words, at_home):
    folder, options, home = at_home
    (home / "exists.gguf").write_text("precious and not a model at all, really")
    (home / "empty.txt").write_text("")
    shutil.copytree(home / "work", home / "foreign")
    text = (home / "foreign" / "analysis.json").read_text()
    (home / "foreign" / "analysis.json").write_text(text.replace(json.loads(text)["identity"], "0" * 16))
    before = {p.name for p in home.iterdir()}
    line = []
    for argument in arguments:
        line += options if argument == "{o}" else [folder if argument == "{m}" else argument]
    result = quantkit(*line, ok=False)
    message = result.stderr.strip()
    assert result.exit_code == 1 and message.startswith("error: ") and "\n" not in message, result.stderr
    assert words in message and "Traceback" not in message
    assert {p.name for p in home.iterdir()} - before <= {"w2"}
    assert (home / "exists.gguf").read_text().startswith("precious")


def test_output_equal_to_input(at_home):
    folder, _, home = at_home
    checkpoint = open_checkpoint(folder)
    write(checkpoint, uniform_plan(checkpoint, "F16", None), home / "x.gguf")
    result = quantkit("quantize", home / "x.gguf", "Q8_0", "-o", home / "x.gguf", "--force", "--work", home / "w", ok=False)
    assert "the input itself" in result.stderr


def test_an_unknown_command_suggests_one():
    result = CliRunner().invoke(main, ["quantise"])
    assert result.exit_code == 2 and "did you mean 'quantize'" in result.stderr
