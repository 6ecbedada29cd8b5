"""Shared fixtures."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Builds (once) and returns the folder of a tiny model by architecture name."""
    import tiny

    root = tmp_path_factory.mktemp("tiny")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else tiny.build(name, folder)

    return get


@pytest.fixture(scope="session")
def tiny_gguf(tiny_folder, tmp_path_factory):
    """Writes (once) and returns the path of a tiny model's GGUF in one format, by architecture."""
    from quantkit.checkpoint import open_checkpoint
    from quantkit.planning.standard import uniform_plan
    from quantkit.quantizer.pipeline import run

    root = tmp_path_factory.mktemp("packed")

    def get(name: str, fmt: str = "Q4_0") -> Path:
        path = root / f"{name}-{fmt}.gguf"
        if not path.exists():
            checkpoint = open_checkpoint(tiny_folder(name))
            run(checkpoint, uniform_plan(checkpoint, fmt, None), path)
        return path

    return get


@pytest.fixture(scope="session")
def analyzed(tiny_folder, tmp_path_factory):
    """(model folder, work directory) of a tiny model with a finished analysis."""
    import tiny

    from quantkit.analysis.run import analyze
    from quantkit.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("analyzed") / "model"
    tiny.build(
        "qwen2_moe",
        folder,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
    )
    work = folder.parent / "work"
    text = folder.parent / "text.txt"
    text.write_text((tiny.EXAMPLES.parent / "text" / "tinystories.txt").read_text()[:60000])
    analyze(open_checkpoint(folder), work, calibration=[text], tokens=8192)
    return folder, work, text


@pytest.fixture(scope="session")
def known(analyzed):
    """(checkpoint, sensitivity, statistics with their moments) of the model in ``analyzed``."""
    from quantkit.analysis.imatrix import load_stats
    from quantkit.analysis.run import ANALYSIS, IMATRIX, attach_moments
    from quantkit.analysis.sensitivity import Sensitivity
    from quantkit.checkpoint import open_checkpoint

    folder, work, _ = analyzed
    checkpoint = open_checkpoint(folder)
    stats = load_stats(work / IMATRIX, checkpoint)
    attach_moments(stats, work)
    return checkpoint, Sensitivity.read(work / ANALYSIS), stats


@pytest.fixture
def at_home(analyzed, tmp_path, monkeypatch):
    """An empty current folder, and options that reuse the finished analysis."""
    folder, work, text = analyzed
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work, tmp_path / "work")
    return folder, ["--work", tmp_path / "work", "--calibration", text, "--tokens", "8192"], tmp_path
