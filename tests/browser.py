"""Headless Chromium (a package of Debian) for pages that are tested as people see them."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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


KEYS = {  # what a keyboard sends: (code, number, text)
    "Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "), "Escape": ("Escape", 27, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""), "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""), "ArrowDown": ("ArrowDown", 40, ""),
}  # fmt: skip


class Window:
    """An open page that takes keys as from a keyboard: the browser itself decides what they do, as it does for people.

    Chrome DevTools Protocol over the two pipes of ``--remote-debugging-pipe``: JSON documents with a zero byte after each.
    """

    def __init__(self, to: BinaryIO, back: BinaryIO) -> None:
        self._to, self._back, self._number, self._session = to, back, 0, ""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer. Raises RuntimeError if the browser refuses it or is gone."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self._back.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser is gone")
            found += byte
        return dict(json.loads(found))

    def open(self, page: Path, width: int, height: int, dark: bool) -> None:
        """Show a file, without motion."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.enable")
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        self.call("Page.bringToFront")

    def press(self, key: str, times: int = 1) -> None:
        """Press and release a key."""
        code, number, text = KEYS[key]
        down = {"type": "keyDown" if text else "rawKeyDown", **({"text": text} if text else {})}
        for _ in range(times):
            for event in (down, {"type": "keyUp"}):
                self.call("Input.dispatchKeyEvent", key=key, code=code, windowsVirtualKeyCode=number, **event)

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page. Raises RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def tab_to(self, selector: str, most: int = 200) -> None:
        """Press Tab until an element of this kind has the focus. Raises RuntimeError if that does not happen."""
        for _ in range(most):
            self.press("Tab")
            if self.ask(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        raise RuntimeError(f"{most} times Tab do not lead to {selector}")


@contextlib.contextmanager
def window(page: Path, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Window]:
    """A page in a browser without a network, closed at the end."""
    assert CHROMIUM is not None
    (read_there, to), (back, write_there) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(to, "wb") as out, open(back, "rb") as into:
        flags = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run",
        ]  # fmt: skip
        script = f'exec "$@" 3<&{read_there} 4>&{write_there}'  # the protocol's numbers
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", *flags],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        try:
            shown = Window(out, into)
            shown.open(page, width, height, dark)
            yield shown
        finally:
            process.terminate()
            process.wait(30)
