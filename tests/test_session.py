"""What the verbs share: a model with outlier channels goes through all of them, and texts are found again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

import quantkit
from quantkit import session
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.transformed import TransformedCheckpoint
from quantkit.errors import CalibrationError
from quantkit.modeling.skeleton import materialized_model
from quantkit.quantizer.fold_groups import Solution, groups_of, transform_of
from quantkit.session import FOLDED, Options, text_behind, without_outliers

TEXT = tiny.EXAMPLES.parent / "text" / "tinystories.txt"


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A tiny model with outlier channels, and a text."""
    folder = tmp_path_factory.mktemp("twin")
    plain = open_checkpoint(tiny.build("llama", folder / "plain", hidden_size=256, intermediate_size=256))
    rng = np.random.default_rng(3)
    solutions = [
        Solution(group, np.where(rng.random(group.channels) < 0.1, -6, 0).astype(np.int32))
        for group in groups_of(plain)
        if group.readers and not group.name.endswith("attn_qk")
    ]
    model = materialized_model(TransformedCheckpoint(plain, transform_of(plain, solutions)))
    model.save_pretrained(folder / "twin")
    for file in (folder / "plain").glob("*token*"):
        (folder / "twin" / file.name).write_bytes(file.read_bytes())
    text = folder / "text.txt"
    text.write_text(TEXT.read_text()[:20000])
    return folder, text


def test_outliers_are_moved_and_the_file_is_still_the_model(twin, tmp_path, monkeypatch):
    folder, text = twin
    options = {"work": folder / "work", "calibration": [text], "tokens": 4096, "probes": False}
    path, manifest = quantkit.quantize(folder / "twin", tmp_path / "a.gguf", bpw=8.5, **options)
    assert (folder / "work" / FOLDED / "analysis.json").exists()
    assert (folder / "work" / "plan.json").exists()
    ids = torch.arange(3, 67)[None]
    with torch.inference_mode():
        wanted, given = (materialized_model(open_checkpoint(p))(ids).logits.log_softmax(-1) for p in (folder / "twin", path))
    assert float((wanted.exp() * (wanted - given)).sum(-1).mean()) < 0.01
    monkeypatch.setattr(session, "find_fold", lambda *a: pytest.fail("found again"))
    again, _ = quantkit.quantize(folder / "twin", tmp_path / "b.gguf", str(folder / "work" / "plan.json"), work=folder / "work")
    assert again.read_bytes()[-10000:] == path.read_bytes()[-10000:]
    assert manifest.source["identity"] == json.loads((folder / "work" / "plan.json").read_text())["identity"]
    assert manifest.source["original"] == open_checkpoint(folder / "twin").identity != manifest.source["identity"]


def test_a_model_without_outliers_and_low_effort_leave_the_weights_alone(twin, tmp_path):
    folder, text = twin
    checkpoint = open_checkpoint(folder / "plain")
    options = Options(calibration=[text], tokens=4096, work=tmp_path / "w")
    assert without_outliers(checkpoint, options) == (checkpoint, options)
    assert (tmp_path / "w" / FOLDED).exists()
    lazy = Options(calibration=[text], tokens=4096, work=tmp_path / "v", effort=1)
    assert without_outliers(open_checkpoint(folder / "twin"), lazy)[1] is lazy
    assert not (tmp_path / "v").exists()


def test_the_text_behind_an_analysis_is_found_again(analyzed):
    folder, work, text = analyzed
    calibration = Sensitivity.read(work / "analysis.json").calibration
    checkpoint = open_checkpoint(folder)
    found = text_behind(checkpoint, Options(), calibration)
    assert np.array_equal(found.train, text_behind(checkpoint, Options(calibration=[text], tokens=8192), calibration).train)
    with pytest.raises(CalibrationError, match=r"gone\.txt"):
        text_behind(checkpoint, Options(), {**calibration, "files": ["/nowhere/gone.txt"]})
