"""Progress on stderr: a bar with rate and time left in a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PATIENCE = 2.0  # seconds before a bar appears

_running: list[Progress] = []


class Task:
    """One running piece of work; its bar appears when it has taken longer than PATIENCE."""

    def __init__(self, owner: Progress, name: str, total: float, unit: str) -> None:
        self._owner, self._name, self._total, self._unit = owner, name, total, unit
        self._started = time.perf_counter()
        self._finished = 0.0
        self._id: Any = None

    def advance(self, amount: float = 1) -> None:
        """Report that ``amount`` more units are done."""
        bar = self._owner.bar
        self._finished += amount
        elapsed = time.perf_counter() - self._started
        if bar is None or elapsed < PATIENCE:
            return
        if self._id is None:
            bar.start()
            self._id = bar.add_task(self._name, total=self._total, rate="")
        bar.update(self._id, completed=self._finished, rate=f"{_short(self._finished / elapsed)} {self._unit}/s")

    def done(self) -> None:
        """Mark the work as complete and take its line away."""
        seconds = self._owner.seconds
        seconds[self._name] = seconds.get(self._name, 0.0) + time.perf_counter() - self._started
        if self._id is not None:
            self._owner.bar.remove_task(self._id)
            self._id = None


def _short(value: float) -> str:
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{sign}"
    return f"{value:.1f}"


class Progress:
    """Hands out tasks. ``Progress()`` is silent; ``Progress.terminal()`` draws bars on stderr.

    seconds: wall time of every finished task, by name.
    """

    def __init__(self, bar: Any = None) -> None:
        self.bar = bar
        self.seconds: dict[str, float] = {}
        if bar is not None:
            _running.append(self)

    @classmethod
    def terminal(cls) -> Progress:
        """Bars if stderr is a terminal, silence otherwise."""
        if not sys.stderr.isatty():
            return cls()
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        return cls(
            Bar(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )
        )  # fmt: skip

    def task(self, name: str, total: float, unit: str = "") -> Task:
        """Begin a task of ``total`` units."""
        return Task(self, name, total, unit)


def stop_all() -> None:
    """Take all bars away and give the terminal back."""
    while _running:
        _running.pop().bar.stop()
