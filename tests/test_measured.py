"""Finished files measured beside their prediction: the same number as the whole model gives, on windows nobody saw."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny

import quantkit
from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.texts import load_calibration
from quantkit.analysis.windows import file_windows, probe_windows
from quantkit.checkpoint import open_checkpoint
from quantkit.progress import Progress
from quantkit.quantizer.manifest import manifest_path
from quantkit.quantizer.measured import Measured, divergences


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_streamed_divergence_equals_that_of_the_whole_model(architecture, tiny_folder, tmp_path):
    folder = tiny_folder(architecture)
    path, _ = quantkit.quantize(folder, tmp_path / "q.gguf", "uniform:Q4_0", use_importance=False)
    original, file = open_checkpoint(folder), open_checkpoint(path)
    windows = np.random.default_rng(0).integers(3, 4096, (6, 32)).astype(np.int64)
    found = divergences(original, file, windows, Progress())
    values = {name: file.read(name) for name, info in original.tensors.items() if info.quantizable}
    np.testing.assert_allclose(found, ProbeModel(original, windows).divergences(values), rtol=1e-2, atol=1e-6)
    assert found.mean() > 0 and not divergences(original, original, windows, Progress()).any()


def test_windows_are_apart_from_statistics_and_probes(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder("qwen3"))
    text = load_calibration(checkpoint, [tiny.EXAMPLES.parent / "text" / "tinystories.txt"], 65536)
    seen = {row.tobytes() for row in (*text.train, *probe_windows(checkpoint, text))}
    for large in (False, True):
        windows = file_windows(checkpoint, text, large)
        assert windows.size == (1024 if large else 4096) and not any(row.tobytes() in seen for row in windows)


def test_the_manifest_has_prediction_and_measurement(analyzed, tmp_path):
    folder, work, text = analyzed
    given = {"bpw": 4.5, "work": work, "calibration": [text], "tokens": 8192}
    path, manifest = quantkit.quantize(folder, tmp_path / "a.gguf", **given)
    written = json.loads(manifest_path(path).read_text())["plan"]
    assert written["measured_kld"] == manifest.plan["measured_kld"] and written["predicted_kld"] > 0
    measured = Measured(**written["measured_kld"])
    assert measured.kld > 0 and measured.error > 0 and "nats/token on" in str(measured)
    _, plain = quantkit.quantize(folder, tmp_path / "b.gguf", "Q4_K_M", work=work)
    assert "measured_kld" not in plain.plan


def test_without_its_text_a_file_is_written_and_not_measured(analyzed, tmp_path):
    folder, work, _ = analyzed
    shutil.copytree(work, tmp_path / "work")
    document = json.loads((tmp_path / "work" / "analysis.json").read_text())
    document["calibration"]["files"] = [str(tmp_path / "gone.txt")]
    (tmp_path / "work" / "analysis.json").write_text(json.dumps(document))
    path, manifest = quantkit.quantize(folder, tmp_path / "a.gguf", bpw=4.5, work=tmp_path / "work", effort=2)
    assert path.exists() and "measured_kld" not in manifest.plan
    assert any("not measured" in note and "gone.txt" in note for note in manifest.notes)
