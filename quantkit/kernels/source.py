"""Triton source of decoders, written from the statement of a format's layout.

A decoder gives the weights of whole blocks in pieces. A piece holds the weights whose bits lie at the same shift of
consecutive bytes, as a tile (blocks, runs, length): its bytes are loaded wide, its shifts and masks are constants, and
a run shares its scale, so that nothing is gathered where arithmetic will do. Where each bit lies is asked of the layout
as numbers; the numbers are then turned back into arithmetic on the tile's two indices (``fitted``). The order of
operations is that of ``Format.decode_blocks``, and so are the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantkit.formats import Format
from quantkit.formats.grids import grid
from quantkit.formats.layout import Grid, Integers, Linear, Trits

Numbers = npt.NDArray[np.int64]
RUN, LANE = "q", "i"  # names of the tile's indices in the source


@dataclass(frozen=True)
class Piece:
    """Weights decoded together. elements: their numbers in the block, int64 (runs, length)."""

    elements: Numbers

    @property
    def runs(self) -> int:
        return self.elements.shape[0]

    @property
    def length(self) -> int:
        return self.elements.shape[1]


@dataclass(frozen=True)
class Plane:
    """Bytes of every block that lie together in a repacked tensor. offset, size: in the block."""

    name: str
    offset: int
    size: int

    @property
    def alignment(self) -> int:
        """The power of two, up to 16, at which each block's part lies."""
        return min(self.size & -self.size, 16)


def planes_of(fmt: type[Format]) -> list[Plane]:
    """A block's fields as planes; those that can be loaded widest come first, so that all are aligned."""
    assert fmt.layout.fields is not None
    found = [Plane(name, int(entry[1]), int(entry[0].itemsize)) for name, entry in fmt.layout.fields.items()]
    return sorted(found, key=lambda plane: -plane.alignment)


def pieces_of(fmt: type[Format]) -> list[Piece]:
    """The pieces of a block, which together cover every weight once."""
    whole = np.arange(fmt.elements)
    if isinstance(fmt.codes, Trits):
        out, first = [], 0
        for _, start, stop, run, digits in fmt.codes.runs:
            part = whole[first : first + (stop - start) * digits].reshape(-1, digits, run)
            out += [Piece(part[:, digit]) for digit in range(digits)]
            first += (stop - start) * digits
        return out
    group = fmt.elements // fmt.groups()
    if isinstance(fmt.values, Grid):
        return [Piece(whole.reshape(-1, grid(fmt.values.name).shape[1]))]
    assert fmt.codes is not None
    planes = fmt.codes.parts[0]
    shifts, run = len(planes[0].shifts(fmt.layout)), planes[0].run
    if shifts == 1 or run == 1:  # neighbours share a byte: no shift is the same for a run
        return [Piece(whole.reshape(-1, group))]
    length = min([group, *(plane.run for plane in planes if plane.run > 1)])
    return [Piece(part.reshape(-1, length)) for part in whole.reshape(-1, shifts, run).swapaxes(0, 1)]


def fitted(numbers: Numbers) -> str | None:
    """Arithmetic on the tile's indices that gives ``numbers`` (runs, length), or None if sums of digits do not."""
    start = int(numbers[0, 0])
    terms, left = [], numbers - start
    for axis, name in ((0, RUN), (1, LANE)):
        size = numbers.shape[axis]
        index = np.arange(size).reshape((-1, 1) if axis == 0 else (1, -1))
        along = left[:, 0] if axis == 0 else left[0]
        bits = [(1 << b, int(along[1 << b])) for b in range(size.bit_length() - 1)]  # what each bit of the index adds
        while bits:
            weight, step = bits.pop(0)
            width = 2
            while bits and bits[0][1] == step * width:
                bits.pop(0)
                width *= 2
            left = left - index // weight % width * step
            if step:
                digit = name if weight == 1 else f"({name} // {weight})"
                digit = digit if weight * width >= size else f"({digit} % {width})"
                terms.append(digit if step == 1 else f"{digit} * {step}")
    if left.any():
        return None
    return " + ".join(([str(start)] if start or not terms else []) + terms)


class Writer:
    """Collects the lines of a function body for one piece."""

    def __init__(self, fmt: type[Format], piece: Piece, planes: bool = False) -> None:
        self.fmt, self.piece, self.count = fmt, piece, 0
        self._planes = planes_of(fmt) if planes else [Plane("block", 0, fmt.block_bytes())]
        self._known: set[str] = set()
        self.lines = [
            f"{RUN} = tl.arange(0, {piece.runs})[None, :, None]",
            f"{LANE} = tl.arange(0, {piece.length})[None, None, :]",
        ]

    def name(self, code: str, stem: str) -> str:
        """A new variable for an expression."""
        self.count += 1
        self.lines.append(f"{stem}{self.count} = {code}")
        return f"{stem}{self.count}"

    def integers(self, part: Integers, items: Numbers) -> str:
        """Integers of a vector, by number (runs, length) or (runs, 1)."""
        bits = part.positions(self.fmt.layout)[items]  # (runs, length, width): where every bit lies
        value = self.name(self._gathered(bits), "n")
        if part.signed:
            flip = 1 << (part.width - 1)
            value = self.name(f"({value} ^ {flip}) - {flip}", "n")
        return value

    def _gathered(self, bits: Numbers) -> str:
        """Code of integers from the places of their bits (runs, length, width), split where no one rule holds for all runs."""
        parts = self._stretches(bits)
        if parts is not None:
            codes = [self._fetched(bits[..., low:high], low) for low, high in parts]
            if all(code is not None for code in codes):
                return " | ".join(code for code in codes if code is not None)
        middle = len(bits) // 2
        if not middle:
            raise ValueError(f"{self.fmt.name}: no rule for where its bits lie")
        low, high = (self._gathered(np.concatenate([half, half])) for half in (bits[:middle], bits[middle:]))
        return f"tl.where({RUN} < {middle}, {low}, {high})"

    @staticmethod
    def _stretches(bits: Numbers) -> list[tuple[int, int]] | None:
        """Ranges of an integer's bits that follow each other in the block, if they are the same for all; else None."""
        width = bits.shape[-1]
        follows = np.diff(bits, axis=-1) == 1
        if (follows.any((0, 1)) != follows.all((0, 1))).any():
            return None
        breaks = [0, *(int(b) + 1 for b in np.flatnonzero(~follows.all((0, 1)))), width]
        return list(pairwise(breaks))

    def base(self, first: int, last: int) -> tuple[str, int]:
        """Name of the pointer to a plane's part of every block, and the byte of the block that it points to."""
        for plane in self._planes:
            if plane.offset <= first and last < plane.offset + plane.size:
                name = f"at_{plane.name}"
                if name not in self._known:
                    self._known.add(name)
                    start = sum(other.size for other in self._planes[: self._planes.index(plane)])
                    self.lines.append(f"{name} = raw + {f'total * {start} + ' if start else ''}block * {plane.size}")
                return name, plane.offset
        raise ValueError(f"{self.fmt.name}: bytes {first} to {last} lie in several planes")

    def _fetched(self, bits: Numbers, to: int) -> str | None:
        """Code of consecutive bits, moved to bit ``to``."""
        width, lowest = bits.shape[-1], bits[..., 0]
        over = int((lowest % 8).max()) + width > 8  # into the next byte
        base, origin = self.base(int(lowest.min()) // 8, int(lowest.max() + width - 1) // 8)
        byte, shift = fitted(lowest // 8 - origin), fitted(lowest % 8)
        if byte is None or shift is None:
            bit = fitted(lowest - 8 * origin)
            if bit is None:
                return None
            bit = self.name(bit, "bit")
            byte, shift = f"({bit} >> 3)", f"{bit} & 7"
        code = f"tl.load({base} + ({byte}), mask=live, other=0).to(tl.int32)"
        if over:
            code = f"({code} | (tl.load({base} + ({byte} + 1), mask=live, other=0).to(tl.int32) << 8))"
        if shift != "0":
            code = f"({code} >> ({shift}))"
        if over or not shift.isdigit() or int(shift) + width != 8:
            code = f"({code} & {2**width - 1})"
        return f"({code} << {to})" if to else code

    def number(self, field: str, other: int = 0) -> str:
        """A floating-point field of every block, float32. other: what masked blocks have."""
        entry = self.fmt.layout.fields[field]  # type: ignore[index]
        place, kind = int(entry[1]), {"F16": "float16", "BF16": "int16", "F32": "float32"}[self.fmt.scale_type]
        base, origin = self.base(place, place + entry[0].itemsize - 1)
        code = f"tl.load(({base} + {place - origin}).to(tl.pointer_type(tl.{kind})), mask=live, other={other})"
        bits = self.fmt.scale_type == "BF16"
        return self.name(f"({code}.to(tl.int32) << 16).to(tl.float32, bitcast=True)" if bits else f"{code}.to(tl.float32)", "d")


def scale(out: Writer, groups: Numbers) -> str:
    """Scales of the runs, float32 (blocks, runs, 1). groups: int64 (runs, 1)."""
    fmt = out.fmt
    if fmt.scale_table is not None:
        assert fmt.scales is not None
        code = out.integers(fmt.scales, groups)
        if fmt.scale_table == "e8m0_half":
            return out.name(f"tl.where({code} < 2, 0x00200000 << {code}, ({code} - 1) << 23).to(tl.float32, bitcast=True)", "s")
        s = out.name(f"tl.load(floats + {code})", "s")
        return out.name(f"tl.div_rn({s}, {out.number(fmt.block_divisor, other=1)})", "s") if fmt.block_divisor else s
    if isinstance(fmt.block_scale, Integers):
        block = fmt.block_scale
        parts = [f"({out.integers(block, np.full_like(groups, k))} << {block.width * k})" for k in range(block.items(fmt.layout))]
        d = out.name(f"({' | '.join(parts)}).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)", "d")
    else:
        assert fmt.block_scale is not None
        d = out.number(fmt.block_scale)
    if fmt.scales is None:
        return d
    rule, code = fmt.scale_rule, f"{out.integers(fmt.scales, groups)}.to(tl.float32)"
    code = f"({rule.step} * {code})" if rule.step != 1 else code
    code = f"({rule.offset} + {code})" if rule.offset else code
    return out.name(f"{d} * {code}" + (f" * {rule.factor}" if rule.factor != 1 else ""), "s")


def packed_table(entries: tuple[int, ...]) -> list[int]:
    """Small integers, eight to a 64-bit word."""
    raw = np.array(entries, np.int8).tobytes().ljust(-(-len(entries) // 8) * 8, b"\0")
    return [int(v) for v in np.frombuffer(raw, np.int64)]


def values(out: Writer, number: int, groups: Numbers) -> str:
    """What the codes of a piece stand for, float32 (blocks, runs, length), with signs and shifts. groups: int64 (runs, 1)."""
    fmt, piece = out.fmt, out.piece
    if isinstance(fmt.codes, Trits):
        return digits(out, number)
    if isinstance(fmt.values, Grid):
        return book_values(out)
    assert fmt.codes is not None
    code = out.integers(fmt.codes, piece.elements)
    if isinstance(fmt.values, Linear):
        if fmt.zeros is not None:
            code = out.name(f"{code} - {out.integers(fmt.zeros, groups)}", "n")
        return out.name(f"({code} - {fmt.values.zero}).to(tl.float32)" if fmt.values.zero else f"{code}.to(tl.float32)", "v")
    if fmt.codes.width == 8 and fmt.float_bits is not None:
        return float8(out, code)
    if not fmt.values.whole:
        return out.name(f"tl.load(floats + {code})", "v")
    words = packed_table(fmt.values.entries)  # type: ignore[arg-type]
    word = (
        f"tl.full({code}.shape, {words[0]}, tl.int64)"
        if len(words) == 1
        else (f"tl.where({code} < 8, tl.full({code}.shape, {words[0]}, tl.int64), tl.full({code}.shape, {words[1]}, tl.int64))")
    )
    return out.name(f"({word} >> (({code} & 7) * 8).to(tl.int64)).to(tl.int8).to(tl.float32)", "v")


def float8(out: Writer, code: str) -> str:
    """E5M2 is the upper half of a half-precision number, E4M3 lies one bit lower in one whose exponent is 8 less."""
    exponent, mantissa = out.fmt.float_bits  # type: ignore[misc]
    low = f"(({code} & 127) << {10 - mantissa})"
    bits = f"({low} | (({code} & 128) << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)"
    if exponent == 5:
        return out.name(bits, "v")
    return out.name(f"tl.where(({code} & 127) == 127, float('nan'), {bits} * 256)", "v")


def digits(out: Writer, number: int) -> str:
    """Codes in base three: a multiplication pushes the digit out of the byte's top."""
    fmt, first = out.fmt, 0
    assert isinstance(fmt.codes, Trits) and isinstance(fmt.values, Linear)
    for name, start, _, run, count in fmt.codes.runs:
        if first <= number < first + count:
            at = int(fmt.layout.fields[name][1]) + start  # type: ignore[index]
            base, origin = out.base(at, at + out.piece.runs * run - 1)
            byte = f"tl.load({base} + ({at - origin} + {RUN} * {run} + {LANE}), mask=live, other=0).to(tl.int32)"
            return out.name(f"(((({byte} * {3 ** (number - first)}) & 255) * 3 >> 8) - {fmt.values.zero}).to(tl.float32)", "v")
        first += count
    raise ValueError(f"{fmt.name} has no piece {number}")


def book_values(out: Writer) -> str:
    """Rows of a code book: one load for all weights of a row."""
    fmt, elements = out.fmt, out.piece.elements
    entry = out.integers(fmt.codes, elements[:, :1] // out.piece.length)  # type: ignore[arg-type]
    row = out.name(f"tl.load(book + {entry}, mask=live, other=0)", "row")
    v = out.name(f"({row} >> ({LANE} * 8)).to(tl.int8).to(tl.float32)", "v")
    if fmt.shifts is not None:
        down = out.integers(fmt.shifts, elements[:, :1] // (fmt.elements // fmt.shifts.items(fmt.layout)))
        v = out.name(f"{v} + tl.where({down} != 0, {-fmt.shift}, {fmt.shift})", "v")
    if fmt.signs is None:
        return v
    if fmt.signs.width == 1:
        bit = out.integers(fmt.signs, elements)
    else:  # seven signs, and an eighth that makes their number even
        seven = out.integers(fmt.signs, elements[:, :1] // 8)
        odd = out.name(f"{seven} ^ ({seven} >> 4)", "odd")
        odd = out.name(f"{odd} ^ ({odd} >> 2)", "odd")
        byte = out.name(f"{seven} | ((({odd} ^ ({odd} >> 1)) & 1) << 7)", "byte")
        bit = out.name(f"({byte} >> ({fitted(elements % 8)})) & 1", "bit")
    return out.name(f"tl.where({bit} != 0, -{v}, {v})", "v")


def body(fmt: type[Format], piece: Piece, number: int, planes: bool) -> list[str]:
    """Lines that return a piece's weights."""
    out = Writer(fmt, piece, planes)
    groups = piece.elements[:, :1] // (fmt.elements // fmt.groups())
    weight = f"{scale(out, groups)} * {values(out, number, groups)}"
    if fmt.block_minimum is not None:
        m = out.number(fmt.block_minimum)
        if fmt.minimums is not None:
            m = out.name(f"{m} * {out.integers(fmt.minimums, groups)}.to(tl.float32)", "m")
        weight = f"{weight} {'-' if fmt.minimum_sign < 0 else '+'} {m}"
    return [*out.lines, f"w = {weight}"]


def decoder_source(fmt: type[Format], planes: bool = False) -> str:
    """Triton source of three functions of a piece.

    ``decode`` gives its weights in ``block`` (of ``total``), ``where`` their numbers in the block, both as a tile (blocks,
    runs, length); ``place`` gives the number of the weight that is ``index``-th in the tile's order. planes: the tensor
    was repacked (repack.py).
    """
    pieces = pieces_of(fmt)
    lines = ["import triton", "import triton.language as tl"]

    def function(head: str, bodies: list[list[str]], result: str) -> None:
        lines.extend(["", "", "@triton.jit", head])
        for number, code in enumerate(bodies):
            lines.append(f"    {'if' if not number else 'elif'} piece == {number}:")
            lines.extend(f"        {line}" for line in code)
        lines.append(f"    return {result}")

    decode = "def decode(raw, block, total, live, book, floats, piece: tl.constexpr):"
    function(decode, [body(fmt, piece, number, planes) for number, piece in enumerate(pieces)], "w")
    shapes = [[*Writer(fmt, piece).lines, f"e = {fitted(piece.elements)}"] for piece in pieces]
    function("def where(piece: tl.constexpr):", shapes, "e")
    flat = [
        [
            f"{RUN} = index // {p.length}",
            f"{LANE} = index" + (f" % {p.length}" if p.runs > 1 else ""),
            f"e = {fitted(p.elements)}",
        ]
        for p in pieces
    ]
    function("def place(index, piece: tl.constexpr):", flat, "e")
    return "\n".join([*lines, ""])
