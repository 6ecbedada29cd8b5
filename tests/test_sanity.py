"""Comparisons both ways: nothing lost shows nothing, and a wrecked layer comes last; every model is run once."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import open_checkpoint
from quantkit.evaluation.compare import compare
from quantkit.evaluation.lm_eval.paired import paired
from quantkit.evaluation.lm_eval.run import Options, evaluate_models
from quantkit.evaluation.runners import TorchRunner
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run

TEXT = tiny.EXAMPLES.parent / "text" / "tinystories.txt"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The shipped model, itself as F32, three files of fewer and fewer bits, and itself with one wrecked layer."""
    folder = tmp_path_factory.mktemp("sanity")
    checkpoint = open_checkpoint(tiny.DENSE)
    paths = {name: folder / f"{name}.gguf" for name in ("F32", "Q8_0", "Q4_0", "Q2_K")}
    for name, path in paths.items():
        run(checkpoint, uniform_plan(checkpoint, name, None), path)
    wrecked = folder / "wrecked"
    shutil.copytree(tiny.DENSE, wrecked)
    values = load_file(wrecked / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    noise = torch.randn(values[name].shape, generator=torch.Generator().manual_seed(0))
    values[name] = (3 * noise * values[name].float().std()).to(values[name].dtype)
    save_file(values, wrecked / "model.safetensors", metadata={"format": "pt"})
    return [tiny.DENSE, *paths.values(), wrecked]


def test_the_original_loses_nothing_and_a_wrecked_layer_most(models, monkeypatch):
    """Five candidates cost one pass of the original and one of each of them."""
    passes = []
    logits = TorchRunner.logits
    monkeypatch.setattr(TorchRunner, "logits", lambda self, ids: passes.append(len(ids)) or logits(self, ids))
    found = compare(models[0], models[1:], [TEXT], window=128, limit=2048).candidates
    assert len(passes) == 6 * 16
    same, wrecked = found[0].divergence, found[-1].divergence
    assert same.mean_kld == same.p999_kld == 0 and same.top1_agreement == 1
    assert same.perplexity_ratio == pytest.approx(1, abs=1e-6)
    for metric, worst in (
        ("mean_kld", max),
        ("median_kld", max),
        ("p99_kld", max),
        ("p999_kld", max),
        ("perplexity_ratio", max),
        ("top1_agreement", min),
    ):
        assert getattr(wrecked, metric) == worst(getattr(one.divergence, metric) for one in found), metric
    assert [one.divergence.mean_kld for one in found] == sorted(one.divergence.mean_kld for one in found)


def test_tasks_say_the_same(models, tmp_path):
    options = Options(tasks=("blimp_local", "wikitext_windows_local"), data="sample", limit=40, work=tmp_path)
    report = evaluate_models([models[0], models[1], models[4], models[5]], options)
    changes = {one.model: one.flips for one in paired(report) if one.task == "blimp_local"}
    same, wrecked = changes[report.models[1].name], changes[report.models[3].name]
    assert same.lost == same.gained == 0 and same.p_value == 1
    assert wrecked.lost > wrecked.gained
    perplexity = [model.results["wikitext_windows_local"].scores[0].value for model in report.models]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-6) and perplexity[3] == max(perplexity) > 1.2 * perplexity[0]
