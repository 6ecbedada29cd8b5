"""Pictures of a report for docs/images: light, dark, and as wide as a phone.

make screenshots                           # compares files of a shipped model first; needs Chromium (Debian: apt install chromium)
python tools/screenshots.py report.html    # of any other report
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
import browser  # noqa: E402
import demo  # noqa: E402

MODEL = ROOT / "examples" / "models" / "qk-moe-11m"
OUT = demo.OUT / "screenshots"
MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K")
# width, height, dark, the element at the top, pixels of the picture for each of the page
PICTURES = {
    "light": (1200, 1500, False, "", 1.0),
    "dark": (1200, 1250, True, "plans", 1.0),
    "phone": (390, 1100, False, "numbers", 2.0),
}


def make_report() -> Path:
    """A report with all that `compare` can show but a sweep: stock mixes and dynamic files of the same bytes."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    model, work, report = str(MODEL), str(OUT / "work"), OUT / "report.html"
    os.environ["QUANTKIT_DATA"] = "sample"  # the tasks' few documents that are shipped
    demo.quantkit("analyze", model, "--work", work)
    files = []
    for mix in MIXES:
        stock, dynamic = (str(OUT / f"{MODEL.name}-{kind}{mix}.gguf") for kind in ("", "dynamic-"))
        demo.quantkit("quantize", model, mix, "--work", work, "-o", stock)
        demo.quantkit("quantize", model, "--work", work, "--like", stock, "-o", dynamic)
        files += [dynamic, stock]
    more = ("--speed", "--tasks", "default", "--prompt", "Once upon a time")
    demo.quantkit("compare", model, *files, "--work", work, *more, "-o", str(report))
    return report


def main() -> None:
    """Write docs/images/report-*.png."""
    if browser.CHROMIUM is None:
        sys.exit(browser.MISSING)
    if len(sys.argv) > 2 or not all(Path(given).is_file() for given in sys.argv[1:]):
        sys.exit(f"usage: {Path(__file__).name} [REPORT.html]")
    report = Path(sys.argv[1]) if len(sys.argv) == 2 else make_report()
    for name, (width, height, dark, place, scale) in PICTURES.items():
        out = ROOT / "docs" / "images" / f"report-{name}.png"
        browser.photograph(report, out, width, height, dark, place, scale)
        print(f"{out.relative_to(ROOT)}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
