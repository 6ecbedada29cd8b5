"""Pictures of a report for docs/images: light, dark, and as wide as a phone.

make screenshots                           # of the demo's report; needs Chromium (Debian: apt install chromium)
python tools/screenshots.py report.html    # of any other
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

# width, height, dark, the element at the top, pixels of the picture for each of the page
PICTURES = {
    "light": (1200, 1500, False, "", 1.0),
    "dark": (1200, 1250, True, "plans", 1.0),
    "phone": (390, 1100, False, "numbers", 2.0),
}


def main() -> None:
    """Write docs/images/report-*.png."""
    if browser.CHROMIUM is None:
        sys.exit(browser.MISSING)
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: {Path(__file__).name} REPORT.html")
    for name, (width, height, dark, place, scale) in PICTURES.items():
        out = ROOT / "docs" / "images" / f"report-{name}.png"
        browser.photograph(Path(sys.argv[1]), out, width, height, dark, place, scale)
        print(f"{out.relative_to(ROOT)}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
