"""The main job on the shipped model: analyze → plan → quantize → generate → compare, from nothing, with a report.

make demo
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "models" / "qk-dense-6m"
OUT = HERE.parent / "demo"


def quantkit(*arguments: str) -> None:
    """Run the command line as a user would, showing the command."""
    print(f"\n$ quantkit {' '.join(arguments)}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / "quantkit"), *arguments], check=True)


def main() -> None:
    """All four stages, then the table."""
    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    model, work = str(MODEL), str(OUT / "work")
    stock, dynamic, report = (str(OUT / name) for name in ("stock-Q3_K_M.gguf", "dynamic-Q3_K_M.gguf", "report.html"))
    quantkit("analyze", model, "--work", work, "--calibration", str(HERE / "text" / "tinystories.txt"), "--tokens", "49152")
    quantkit("quantize", model, "Q3_K_M", "--work", work, "-o", stock)
    quantkit("plan", model, "--work", work, "--like", stock)
    quantkit("quantize", model, "--work", work, "--like", stock, "-o", dynamic)
    quantkit("verify", dynamic)
    quantkit("generate", dynamic, "-p", "Once upon a time", "-n", "48")
    quantkit("compare", model, stock, dynamic, "--work", work, "-o", report)
    print(f"\nfinished in {time.perf_counter() - started:.0f} s; open {report}")


if __name__ == "__main__":
    main()
