"""Tuning: what fails, is wrong or slow is never chosen; what is chosen is used."""

from __future__ import annotations

import json
import time

import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit.api import generate, quantize
from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.errors import FormatError, PlanError
from quantkit.evaluation import tune as module
from quantkit.evaluation.tune import PLAIN, WAYS, Way, tune, tuned_arguments, tuning_path
from quantkit.evaluation.tune_kernels import search
from quantkit.kernels import settings
from quantkit.kernels.settings import Settings, document, settings_of, settings_path


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return quantize(tiny.DENSE, tmp_path / "dense.gguf", "Q4_0", use_importance=False)[0]


def slow(graph, inputs):
    def run(*args):
        time.sleep(0.05)
        return graph(*args)

    return run


def wrong(graph, inputs):
    return lambda *args: [value * 1.1 if value.is_floating_point() and value.ndim == 3 else value for value in graph(*args)]


def test_only_what_works_and_is_faster_is_chosen(file, monkeypatch):
    """Ways that fail, compute something else, or take longer; on the CPU none that needs a GPU."""
    checkpoint = open_checkpoint(file)
    ways = (
        Way(PLAIN), Way("fails", {"backend": "no such backend"}), Way("slow", {"backend": slow}),
        Way("wrong", {"backend": wrong}), Way("graphs", {"mode": "reduce-overhead"}, gpu=True),
    )  # fmt: skip
    found = tune(checkpoint, "Once upon a time", 4, ways=ways)
    trials = {trial.way: trial for trial in found.trials}
    assert list(trials) == [PLAIN, "fails", "slow", "wrong"] and found.chosen == PLAIN
    assert "no such backend" in trials["fails"].failed and "of their spread" in trials["wrong"].failed
    assert trials["slow"].token_seconds > 0.05 and not trials["slow"].failed and trials["slow"].graphs >= 1
    assert tuned_arguments(checkpoint.identity, "cpu") is None
    tuning_path(checkpoint.identity, "cpu").write_text("{")
    with pytest.raises(PlanError, match="damaged"):
        tuned_arguments(checkpoint.identity, "cpu")
    with pytest.raises(PlanError, match="not tuned"):
        tuned_arguments("another", "cpu")
    with pytest.raises(PlanError, match="prompt is empty"):
        monkeypatch.setattr("quantkit.modeling.text.TextEncoder.prompt", lambda self, text: [])
        tune(checkpoint, "")


def test_the_choice_is_kept_and_used(file, monkeypatch):
    eager = Way("graph alone", {"backend": "eager"})
    monkeypatch.setattr(module, "WAYS", (Way(PLAIN), eager))
    done = CliRunner().invoke(main, ["tune", str(file), "--compile", "-n", "3", "--json"])
    facts = json.loads(done.stdout)
    assert done.exit_code == 0 and facts["device"] == "cpu" and len(facts["trials"]) == 2 and facts["versions"]["torch"]
    path = next((file.parent / "cache" / "tune").iterdir())
    path.write_text(json.dumps({**facts, "chosen": eager.name}))
    assert tuned_arguments(open_checkpoint(file).identity, "cpu") == {"backend": "eager"}
    plain, compiled = (generate(file, "Once upon a time", 8, compiled=value) for value in (False, True))
    assert plain.tokens == compiled.tokens
    shown = CliRunner().invoke(main, ["tune", str(file), "--compile", "-n", "3"])
    assert shown.exit_code == 0 and "per token" in shown.stdout and "chosen: " in shown.stdout


def test_the_ways_have_names_of_their_own():
    assert len({way.name for way in WAYS}) == len(WAYS) and WAYS[0].name == PLAIN and WAYS[0].arguments is None


def test_settings_of_programs_are_kept_only_if_they_help(tmp_path, monkeypatch):
    """A search with times of our own: a setting that helps is kept, one that fails or does not help is not."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))

    def seconds(work):
        now = settings_of(torch.zeros(1))
        if now.rows == 128:
            raise RuntimeError("out of resource: registers")
        return work() * (0.5 if now.row_outputs == 8 else 0.7 if now.row_outputs == 2 else 1) * (0.999 if now.warps == 4 else 1)

    found = search([lambda: 1.0, lambda: 2.0], seconds, "A GPU")
    assert found.settings == Settings(row_outputs=8)
    steps = {(step.setting, step.value): step for step in found.steps}
    assert (
        "registers" in steps["rows", 128].failed
        and not steps["warps", 4].kept
        and steps["row_outputs", 8].share == pytest.approx(0.5)
    )
    path = settings_path("A GPU")
    path.parent.mkdir()
    path.write_text(document(found.settings))
    assert settings._kept("A GPU") == found.settings and settings._kept("another") == Settings()
    settings_path("B").write_text("{}")
    with pytest.raises(FormatError, match="damaged"):
        settings._kept("B")
    assert settings_of(torch.zeros(1)) == Settings()
    for arguments, words in (
        (["--device", "cpu"], "no programs to tune"),
        (["--device", "cuda:9"], "cannot work on"),
        (["--compile"], "needs a MODEL"),
        (["model"], "with --compile"),
    ):
        done = CliRunner().invoke(main, ["tune", *arguments])
        assert done.exit_code == 1 and (words in done.stderr or torch.cuda.is_available())
