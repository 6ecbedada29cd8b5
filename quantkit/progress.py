"""Progress on stderr: a bar with rate and time left in a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from typing import Any


class Task:
    """One running piece of work."""

    def __init__(self, bar: Any = None, task_id: Any = None) -> None:
        self._bar, self._id = bar, task_id

    def advance(self, amount: float = 1) -> None:
        """Report that ``amount`` more units are done."""
        if self._bar is not None:
            self._bar.advance(self._id, amount)

    def done(self) -> None:
        """Mark the work as complete and take its line away."""
        if self._bar is not None:
            self._bar.remove_task(self._id)


class Progress:
    """Hands out tasks. ``Progress()`` is silent; ``Progress.terminal()`` draws bars on stderr."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar

    @classmethod
    def terminal(cls) -> Progress:
        """Bars if stderr is a terminal, silence otherwise. They appear for work of over two seconds."""
        if not sys.stderr.isatty():
            return cls()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        del MofNCompleteColumn
        return cls(bar)

    def task(self, name: str, total: float, unit: str = "") -> Task:
        """Begin a task of ``total`` units."""
        if self._bar is None:
            return Task()
        self._bar.start()
        return Task(self._bar, self._bar.add_task(name, total=total, rate=""))

    def stop(self) -> None:
        """Take the bars away."""
        if self._bar is not None:
            self._bar.stop()
