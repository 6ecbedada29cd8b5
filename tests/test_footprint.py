"""What running a model takes: measured alone, in the table, the JSON and the report; mistakes cost one line."""

from __future__ import annotations

import html
import importlib.util
import json
import shutil
import subprocess

import oracle
import pytest
import tiny
from click.testing import CliRunner

from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.evaluation import footprint
from quantkit.evaluation.footprint import Footprint, footprints
from quantkit.evaluation.footprint_program import memory, prompt_of


def plausible(found: Footprint, file_bytes: int) -> None:
    assert 0 < found.load_seconds < 60 and found.prompt_tokens >= 16 and found.new_tokens >= 8
    assert found.prompt_speed > found.speed > 1  # a prompt's tokens are read together
    assert found.memory_bytes is not None and found.model_bytes is not None
    assert file_bytes / 2 < found.model_bytes < found.memory_bytes < 4 << 30


def need_llama_cpp() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        oracle.missing("llama-cpp-python")


def test_torch_runs_each_model_alone_as_it_is(tiny_folder, tiny_gguf):
    folder, file = tiny_folder("llama"), tiny_gguf("llama", "Q4_0")
    for found, path in zip(footprints([folder, file]), (folder, file), strict=True):
        plausible(found, sum(f.stat().st_size for f in open_checkpoint(path).weight_files))


def test_llama_cpp_runs_files_and_folders(tiny_folder, tiny_gguf):
    need_llama_cpp()
    for found in footprints([tiny_folder("llama"), tiny_gguf("llama", "Q4_0")], "llama"):
        plausible(found, 0)


def test_the_prompt_is_text_within_the_context():
    checkpoint = open_checkpoint(tiny.MOE)
    ids, count = prompt_of(checkpoint)
    context = checkpoint.config["max_position_embeddings"]
    assert len(ids) == min(512, context // 2) and len(ids) + count < context and len(set(ids)) > 16


def test_memory_is_read_from_the_system_if_it_tells():
    now, most = memory("VmRSS"), memory("VmHWM")
    assert now is not None and most is not None and 10 << 20 < now <= most
    assert memory("VmNothing") is None


def test_a_model_that_cannot_run_says_so(tmp_path, tiny_gguf):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf does not exist"):
        footprints([tmp_path / "nothing.gguf"])
    cut = tmp_path / "cut.gguf"
    shutil.copy(tiny_gguf("llama", "Q4_0"), cut)
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        footprints([cut])


@pytest.mark.parametrize(
    ("code", "out", "err", "words"),
    [(-9, "", "", "it was killed"), (-11, "", "", "signal 11"), (1, "", "a\nbus error", "it said: bus error"), (0, "{}", "", "failed"), (0, "3", "", "failed")],
)  # fmt: skip
def test_a_process_that_dies_is_one_error(code, out, err, words, monkeypatch, tmp_path):
    monkeypatch.setattr(footprint.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code, out, err))
    with pytest.raises(QuantkitError, match=words):
        footprints([tmp_path / "m.gguf"])


def test_compare_shows_what_running_takes(tiny_folder, tiny_gguf, tmp_path):
    need_llama_cpp()
    arguments = [
        "compare",
        str(tiny_folder("llama")),
        str(tiny_gguf("llama", "Q4_0")),
        "--speed",
        "--runtime",
        "llama",
        "--limit",
        "512",
    ]
    said = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "r.html"), "--json"])
    assert said.exit_code == 0, said.output
    document = json.loads(said.output)
    numbers = [document["reference_footprint"], document["candidates"][0]["footprint"]]
    text = html.unescape((tmp_path / "r.html").read_text())
    for found in numbers:
        plausible(Footprint(**found), 0)
        for name, number in found.items():
            if name not in ("prompt_tokens", "new_tokens"):
                assert f'data-key="{name}" data-value="{json.dumps(number)}"' in text
    kept = tmp_path / "kept"
    table = CliRunner().invoke(main, [*arguments, "--cache", str(kept)])
    assert table.exit_code == 0 and "then, tokens/s" in table.output and "peak memory, MiB" in table.output
    alone = CliRunner().invoke(main, ["compare", str(kept), *arguments[2:-2]])
    assert alone.exit_code == 0, alone.output  # of what was kept nothing runs
    assert "then, tokens/s" in alone.output
