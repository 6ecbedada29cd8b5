"""Headless Chromium (a package of Debian) for pages that are tested as people see them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
MISSING = "no Chromium is installed (Debian: apt install chromium)"


@dataclass(frozen=True)
class Shown:
    """dom: the page after its script ran. console: what was written there, errors of its own included."""

    dom: str
    console: list[str]


def show(page: Path, width: int = 1200, dark: bool = False, more: tuple[str, ...] = ("--dump-dom",), height: int = 900) -> Shown:
    """Open a file without any network."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}",
        "--virtual-time-budget=3000", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        "--allow-file-access-from-files", *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        *more, page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def framed(page: Path, width: int, height: int, after: str = "") -> Path:
    """A document beside ``page`` that shows it in a frame, since a window cannot be as narrow as a phone. after: HTML."""
    outside = page.with_name(f"frame-{page.name}")
    frame = f'<iframe id="f" src="{page.name}" width="{width}" height="{height}" style="border:0;display:block"></iframe>'
    outside.write_text(f'<!doctype html><body style="margin:0">{frame}{after}', encoding="utf-8")
    return outside


def photograph(page: Path, out: Path, width: int, height: int, dark: bool = False, place: str = "", scale: float = 1) -> None:
    """A picture of the page's window, in pixels times ``scale``. place: id of the element that it begins with."""
    from PIL import Image

    script = f"onload = () => document.getElementById('f').contentDocument.getElementById('{place}').scrollIntoView({{ behavior: 'instant' }})"
    outside = framed(page, width, height, f"<script>{script}</script>" if place else "")
    more = (f"--screenshot={out.resolve()}", f"--force-device-scale-factor={scale:g}")
    show(outside, max(width, 500), dark, more, height)
    outside.unlink()
    with Image.open(out) as picture:
        smaller = picture.crop((0, 0, round(width * scale), round(height * scale))).convert("RGB")
    smaller.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def ask(page: Path, expression: str, width: int = 1200, dark: bool = False) -> Any:
    """What a JavaScript expression gives in the page, whose window is ``view`` and whose document is ``page`` there."""
    find = "const view = document.getElementById('f').contentWindow, page = view.document;"
    say = f"document.title = JSON.stringify({expression})"
    outside = framed(page, width, 900, f"<script>onload = () => {{ {find} {say} }}</script>")
    dom = show(outside, max(width, 500), dark).dom
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
