"""What the benchmarks share: where things lie, the peers' tools, rows with hardware and commit."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from quantkit.versions import package_versions

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT / "tools"))
import build_llama  # noqa: E402

TOOLS = build_llama.cache_dir() / "runtime"


def tool(name: str, *arguments: str | Path) -> str:
    """Run one of llama.cpp's tools; returns what it printed, stops on failure."""
    done = subprocess.run([str(TOOLS / name), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def environment() -> dict[str, Any]:
    """Commit, hardware and versions of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    dirty = bool(
        subprocess.run(["git", "status", "--porcelain", "quantkit"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    )
    packages = package_versions("torch", "transformers", "numpy", "numba", "scipy")
    packages["llama.cpp"] = f"llama-cpp-python {build_llama.VERSION}"
    return {
        "date": date.today().isoformat(), "commit": commit + ("+changes" if dirty else ""), "processor": _processor(),
        "cores": len(__import__("os").sched_getaffinity(0)), "python": platform.python_version(), "versions": packages,
    }  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_results(name: str, command: str, rows: Any, **extra: Any) -> Path:
    """Write one results file; the newest run replaces the older."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, **environment(), **extra, "rows": rows}, indent=1) + "\n")
    return path
