"""Drawing in SVG: elements, axes, marks and labels that keep out of each other's way. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

FONT = 12  # height of text, pixels
LETTER = 6.6  # mean width of a letter, pixels
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # circle
    "M-4-4h8v8h-8z",  # square
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",  # diamond
    "M0-5.2L5 3.8H-5z",  # triangle
    "M0 5.2L5-3.8H-5z",  # triangle, point down
    "M-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",  # cross
    "M0-6L1.6-1.6L6 0L1.6 1.6L0 6L-1.6 1.6L-6 0L-1.6-1.6z",  # star
)
DASHES = ("", "6 3", "2 3", "8 3 2 3")
COLOURS = 5  # of series: report.css, --s0 to --s4


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. Attributes: ``class_`` for class, ``_`` for ``-``; those that are None or "" are left out."""
    said = Markup("").join(
        Markup(' {}="{}"').format(_attribute(key), format(value, ".6g") if isinstance(value, float) else value)
        for key, value in attributes.items()
        if value is not None and value != ""
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, Markup("").join(escape(child) for child in children))


def _attribute(key: str) -> Markup:
    return Markup(key.rstrip("_").replace("_", "-") if key not in ("viewBox",) else key)


def chart(width: float, height: float, label: str, *parts: object, class_: str = "chart") -> Markup:
    """A picture with a name for who cannot see it. Its text is drawn at ``FONT`` pixels if it is shown ``width`` wide."""
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", tag("title", label), *parts, viewBox=box, role="img", aria_label=label, class_=class_)


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``. Logarithmic values are above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; of one beyond the ends, that of the end."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + min(max(share, 0), 1) * (self.end - self.start), 2)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        if not self.log or self.high < 5 * self.low:
            return linear_ticks(self.low, self.high, most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if self.high < 80 * self.low else (1,)
        step = max(1, math.ceil((last - first) / most)) if len(factors) == 1 else 1
        found = [f * 10.0**e for e in range(first, last + 1, step) for f in factors]
        return [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_range(values: Iterable[float], room: float = 0.12) -> tuple[float, float]:
    """Ends of a logarithmic axis for values above 0 with ``room`` (share of its length) on either side."""
    logs = [math.log10(v) for v in values if v > 0 and math.isfinite(v)] or [-3.0, 0.0]
    spare = max(room * (max(logs) - min(logs)), 0.15)
    return 10 ** (min(logs) - spare), 10 ** (max(logs) + spare)


def tick_text(value: float) -> str:
    """Short, without exponents where people would not write one."""
    if value and not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{power}" if mantissa == "1" else f"{mantissa}·10{power}"
    return f"{value:g}"


def frame(x: Axis, y: Axis, x_title: str, y_title: str, whole: bool = False) -> list[Markup]:
    """Grid, ticks and titles. whole: ticks of x at whole numbers only."""
    parts = []
    for value in y.ticks():
        parts.append(tag("path", d=f"M{x.start:g} {y.at(value):g}H{x.end:g}", class_="grid"))
        parts.append(text(x.start - 6, y.at(value) + 4, tick_text(value), "end"))
    for value in x.ticks(max(2, int((x.end - x.start) / 70))):
        if whole and value != int(value):
            continue
        parts.append(tag("path", d=f"M{x.at(value):g} {y.start:g}v4", class_="axis"))
        parts.append(text(x.at(value), y.start + 17, tick_text(value), "middle"))
    parts.append(tag("path", d=f"M{x.start:g} {y.start:g}H{x.end:g}", class_="axis"))
    parts.append(text(x.end, y.start + 34, x_title, "end", "name"))
    parts.append(text(x.start - 40, y.end - 10, y_title, "start", "name"))
    return parts


def text(x: float, y: float, words: str, anchor: str = "start", class_: str = "") -> Markup:
    """Words at a place."""
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def series(number: int) -> str:
    """Class of the colour of a series."""
    return f"s{number % COLOURS}"


def mark(number: int, x: float, y: float, title: str, hollow: bool = False, class_: str | None = None) -> Markup:
    """A mark of a series: colour and shape repeat at different numbers, so that no two of 35 look the same."""
    names = f"mark {class_ or series(number)}{' hollow' if hollow else ''}"
    shape = SHAPES[number % len(SHAPES)]
    return tag("path", tag("title", title), d=shape, transform=f"translate({x:g} {y:g})", class_=names)


def line(number: int, points: Sequence[tuple[float, float]], class_: str | None = None) -> Markup:
    """Points (pixels) of a series, connected."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return tag(
        "path", d=path, class_=f"line {class_ or series(number)}", stroke_dasharray=DASHES[number // COLOURS % len(DASHES)]
    )


def error_bar(x: float, low: float, high: float, class_: str) -> Markup:
    """From pixel ``low`` to ``high`` with ends."""
    return tag("path", d=f"M{x:g} {low:g}V{high:g}M{x - 3:g} {low:g}h6M{x - 3:g} {high:g}h6", class_=f"line {class_}")


@dataclass(frozen=True)
class Box:
    """A rectangle that is taken, pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether both share some room."""
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def place_labels(points: Sequence[tuple[float, float, str]], room: Box, others: Iterable[Box] = ()) -> list[Markup]:
    """A label (x, y, words) beside each point where there is room; one without room is left out (its mark has a title).

    others: what labels must not cover, besides the points.
    """
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points] + list(others)
    out = []
    for x, y, words in points:
        wide = LETTER * len(words)
        tries = (
            (x + 8, y - 7, "start"), (x + 9, y + 4, "start"), (x - 9, y + 4, "end"), (x, y - 11, "middle"),
            (x, y + 20, "middle"), (x - 8, y - 9, "end"), (x + 8, y + 17, "start"), (x - 8, y + 17, "end"),
        )  # fmt: skip
        for left, base, anchor in tries:
            start = left - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = Box(start, base - FONT + 1, start + wide, base + 3)
            inside = box.left >= room.left and box.right <= room.right and box.top >= room.top and box.bottom <= room.bottom
            if inside and not any(box.meets(other) for other in taken):
                taken.append(box)
                out.append(text(left, base, words, anchor, "label"))
                break
    return out
