"""Formats in words and pictures: the bytes of a block, and what a multiplier costs."""

from __future__ import annotations

import numpy as np

from quantkit.formats.base import Format
from quantkit.formats.grids import grid
from quantkit.formats.layout import Grid, Integers, Linear, Table, Trits

NAMES = {
    "codes": "code",
    "scales": "scale",
    "minimums": "minimum",
    "signs": "sign",
    "shifts": "shift",
    "block_scale": "part of d",
}
WIDTH = 64  # characters of the bar


def largest_value(fmt: type[Format]) -> int:
    """Largest magnitude among the integers that a format's codes stand for."""
    if isinstance(fmt.values, Table):
        return int(max(map(abs, fmt.values.entries)))
    if isinstance(fmt.values, Grid):
        return int(np.abs(grid(fmt.values.name)).max())
    assert isinstance(fmt.values, Linear)
    width = fmt.codes.width if isinstance(fmt.codes, Integers) else 2
    count = fmt.values.count or (3 if isinstance(fmt.codes, Trits) else 2**width)
    if isinstance(fmt.codes, Integers) and fmt.codes.signed:
        return 2 ** (width - 1) - 1
    return max(fmt.values.zero, count - 1 - fmt.values.zero)


def multiplier_cost(fmt: type[Format]) -> int:
    """Relative size of a hardware multiplier for the format's values: exponent bits + mantissa bits².

    A rule of thumb (the adder for exponents grows linearly, the array for mantissas with the square).
    An integer counts as a mantissa of the bits of its magnitude. F32 is 537, BF16 57, E2M1 3, ternary 1.
    """
    if fmt.float_bits is not None:
        exponent, mantissa = fmt.float_bits
        return exponent + mantissa**2
    return max(1, largest_value(fmt).bit_length()) ** 2


def draw(fmt: type[Format]) -> str:
    """The block as text: a bar in proportion, then a line for each field, then the first byte of codes."""
    fields = list((fmt.layout.fields or {}).items())
    bar, names = "", ""
    for name, (kind, *_) in fields:
        width = max(len(name) + 2, round(WIDTH * kind.itemsize / fmt.block_bytes()))
        bar += "┬" + "─" * width
        names += "│" + name.center(width)
    lines = ["┌" + bar[1:] + "┐", names + "│", "└" + bar[1:].replace("┬", "┴") + "┘"]
    for name, (kind, start, *_) in fields:
        stop = start + kind.itemsize - 1
        place = f"{start}" if start == stop else f"{start}–{stop}"
        lines.append(f"byte {place:8} {name:9} {contents(fmt, name)}")
    first = first_byte(fmt)
    return "\n".join([*lines, first] if first else lines)


def contents(fmt: type[Format], field: str) -> str:
    """What a field holds, in words."""
    kind = fmt.layout[field]
    if kind == np.float16 and fmt.codes is not None:
        return "half-precision " + ("minimum" if field == fmt.block_minimum else "scale")
    found = []
    for name, part in fmt.integers().items():
        word = NAMES[name]
        if isinstance(part, Trits):
            held = [(stop - start) * digits for f, start, stop, _, digits in part.runs if f == field]
            found += (
                [f"{sum(held)} codes in base three, {max(d for f, *_, d in part.runs if f == field)} to a byte"] if held else []
            )
            continue
        for piece in part.parts:
            for plane in piece:
                if plane.field == field:
                    count = plane.items(fmt.layout)
                    which = (
                        ""
                        if plane.bits == part.width
                        else f" (bits {plane.to}–{plane.to + plane.bits - 1})"
                        if plane.bits > 1
                        else f" (bit {plane.to})"
                    )
                    unit = "bit" if plane.bits == 1 else "bits"
                    found.append(f"{count} × {plane.bits} {unit} of {word}{which}")
    return ", ".join(found) or {"x": "the number"}.get(field, "")


def first_byte(fmt: type[Format]) -> str:
    """Whose bits lie in the first byte of the codes."""
    if not isinstance(fmt.codes, Integers):
        return ""
    positions = fmt.codes.positions(fmt.layout)
    byte = int(positions[0, 0]) // 8
    parts = []
    for item, bits in enumerate(positions):
        inside = sorted(int(b) - 8 * byte for b in bits if b // 8 == byte)
        if inside:
            span = f"bit {inside[0]}" if len(inside) == 1 else f"bits {inside[0]}–{inside[-1]}"
            parts.append((inside[0], f"{span} code {item}"))
    return f"byte {byte}: " + ", ".join(text for _, text in sorted(parts))
