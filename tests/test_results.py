"""Pages with results say what the benchmarks recorded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "write_results.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("write_results", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_agree_with_the_recorded_results():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_changed_number_is_found(tool, tmp_path, monkeypatch, capsys):
    data = json.loads((tool.RESULTS / "quality.json").read_text())
    next(row for row in data["rows"] if row["what"] == tool.STOCK and row.get("judge") == "llama")["kld"] *= 2
    (tmp_path / "quality.json").write_text(json.dumps(data))
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["write_results.py", "--check"])
    with pytest.raises(SystemExit, match="does not agree"):
        tool.main()


def test_cells_and_ranges(tool):
    rows = [{"text": "code", "kld": 0.5, "ratio": 0.25}, {"text": "stories", "kld": 1.0}]
    assert tool.cells(rows, ["stories", "code", "technical"]) == ["1.00000", "0.50000 (0.25 ×)", "–"]
    assert tool.spread([0.251, 0.249], 2, " ×") == "0.25 ×" and tool.spread([0.2, 0.3], 1) == "0.2 to 0.3"
