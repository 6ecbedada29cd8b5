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


def test_cells_and_the_worst_text(tool):
    rows = [{"text": "code", "kld": 0.5, "ratio": 0.25}, {"text": "stories", "kld": 1.0}]
    assert tool.cells(rows, ["stories", "code", "technical"]) == ["1.00000", "0.50000 (0.25 ×)", "–"]
    ways = {"effort 2: two_sided": (0.3, 0.4), "effort 3: sequential": (0.25, 0.2)}
    rows = [
        {"model": "m", "mix": "Q4_K_M", "judge": "llama", "what": what, "kld": 0.1, "ratio": ratio}
        for what, ratios in ways.items() for ratio in ratios
    ]  # fmt: skip
    assert tool.quality_summary({"rows": rows})[2:] == ["| Q4_K_M | 0.40 / 0.25 |"]
    assert len(tool.quality_summary({"rows": rows[:2]})) == 2  # nothing where an effort is missing
