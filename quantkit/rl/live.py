"""A run in the terminal while it goes on: curves of a line each, and the newest completion."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from quantkit.rl.report import curves, title

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # characters of a curve
SHOWN = 400  # of the newest completion
UNPRINTED = dict.fromkeys((*range(10), *range(11, 32), *range(127, 160)))  # what terminals take for commands


def curve(values: list[float], width: int = WIDTH) -> str:
    """Values as bars from their least to their largest, means of equal parts where there are more than ``width``; only numbers count."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    parts = [
        values[i * len(values) // width : max(i * len(values) // width + 1, (i + 1) * len(values) // width)] for i in range(width)
    ]
    means = [sum(part) / len(part) for part in parts] if len(values) > width else values
    low, high = min(means), max(means)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in means)


def table(log: list[dict[str, Any]], steps: int, seconds: float, sample: dict[str, Any] | None = None, begun: int = 0) -> Any:
    """What the terminal shows. log: a dictionary for each step. steps: of the whole run. sample: the newest completion.

    begun: steps that were done before the clock started.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [row for row in log if "step" in row and "train_runtime" not in row]
    done = max((row["step"] for row in rows), default=0)
    left = f", {seconds / (done - begun) * (steps - done) / 60:.1f} min left" if done > begun else ""
    out = Table(title=f"step {done} of {steps}, {seconds / 60:.1f} min{left}", box=box.SIMPLE, title_justify="left")
    out.add_column("")
    out.add_column("now", justify="right")
    out.add_column("first to last")
    for name in curves(rows):
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if values:
            out.add_row(title(name), f"{values[-1]:.4g}", curve(values))
    if sample is not None:
        rewards = ", ".join(f"{name} {value:.3g}" for name, value in sample["rewards"].items() if value is not None)
        out.caption = Text(f"{sample['completion'][:SHOWN].translate(UNPRINTED)}\n→ {rewards}")
        out.caption_justify = "left"
    return out


class Live:
    """Draws on stderr if that is a terminal; otherwise does nothing."""

    def __init__(self, steps: int, console: Any = None, begun: int = 0) -> None:
        from rich.console import Console
        from rich.live import Live as Screen

        self._steps, self._begun, self._started = steps, begun, time.perf_counter()
        used = console or Console(file=sys.stderr)
        self._screen = Screen(console=used, auto_refresh=False) if used.is_terminal else None
        if self._screen is not None:
            self._screen.start()

    def show(self, log: list[dict[str, Any]], sample: dict[str, Any] | None = None) -> None:
        """Draw the log as it is now."""
        if self._screen is not None:
            seconds = time.perf_counter() - self._started
            self._screen.update(table(log, self._steps, seconds, sample, self._begun), refresh=True)

    def close(self) -> None:
        """Leave the last picture where it is."""
        if self._screen is not None:
            self._screen.stop()
            self._screen = None
