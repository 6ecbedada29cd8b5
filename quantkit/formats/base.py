"""One class per format: its block layout as data, what follows from it, and the registry.

A format is declared by subclassing :class:`Format` and stating where the bits lie and what they stand for
(the vocabulary is in layout.py); the subclass registers itself. Decoding, packing, drawings and kernels
follow from that statement.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError
from quantkit.formats.grids import grid, table
from quantkit.formats.layout import Grid, Integers, Linear, ScaleRule, Table, Trits

F32 = np.float32
COMPILED_FROM = 1 << 17  # weights: below, compiling or loading the fast decoder is not worth it

T = TypeVar("T")
_REGISTRY: dict[str, type[Format]] = {}
_BY_GGUF_ID: dict[int, type[Format]] = {}


class Format:
    """What the bytes of one quantized type mean. Not instantiated: the class is the value.

    A weight is ``scale · value [± minimum]``. value: a code minus a zero point, an entry of a table, or a
    component of a code book's row, with a sign and a shift where they are kept apart. scale: the block's,
    or a group's by ``scale_rule``.

    Class attributes
    ----------------
    name: the name users know, as llama.cpp prints it in upper case (``Q4_K``).
    gguf_id: ``ggml_type`` number in a GGUF file; formats without one are not registered (tensors/blocks.py).
    elements: weights in one block.
    layout: structured dtype of one block; its item size is the bytes per block.
    codes, values: the integers kept for each weight (or group of a code book) and what they stand for.
    block_scale: the scale: a field's name, or the integers that hold its bits. scale_type: F16, BF16 (as its bits) or F32.
    scales, scale_rule: one integer for each group of weights, and its effect. scale_table: the scales
        themselves by integer (name in grids.py) where there is no block scale. block_divisor: a field that divides them.
    block_minimum, minimums: the same for minimums, in half precision; minimum_sign is +1 where they are added.
    zeros: one integer for each group, taken from its codes.
    signs: a set bit negates a weight; 7-bit integers hold eight signs of even parity.
    shifts, shift: a set bit shifts values by −shift, a clear one by +shift.
    has_zero: some code decodes to exactly zero in every block.
    fallback: name of the format llama.cpp uses when a row is not a multiple of ``elements``.
    uses_importance: ggml weighs errors by activation statistics. needs_importance: it refuses to encode without.
    float_bits: (exponent, mantissa) bits where values are floating-point numbers.
    containers: file kinds that can hold the format.
    offered: the planner may choose it.
    advice: when to choose it, a sentence for docs/formats.md.
    """

    name: ClassVar[str] = ""
    gguf_id: ClassVar[int] = -1
    elements: ClassVar[int] = 1
    layout: ClassVar[np.dtype]
    codes: ClassVar[Integers | Trits | None] = None
    values: ClassVar[Linear | Table | Grid] = Linear()
    block_scale: ClassVar[str | Integers | None] = "d"
    scale_type: ClassVar[str] = "F16"
    scales: ClassVar[Integers | None] = None
    scale_rule: ClassVar[ScaleRule] = ScaleRule()
    scale_table: ClassVar[str | None] = None
    block_divisor: ClassVar[str | None] = None
    block_minimum: ClassVar[str | None] = None
    minimums: ClassVar[Integers | None] = None
    minimum_sign: ClassVar[int] = 1
    zeros: ClassVar[Integers | None] = None
    signs: ClassVar[Integers | None] = None
    shifts: ClassVar[Integers | None] = None
    shift: ClassVar[float] = 0.0
    has_zero: ClassVar[bool] = True
    fallback: ClassVar[str | None] = None
    uses_importance: ClassVar[bool] = True
    needs_importance: ClassVar[bool] = False
    float_bits: ClassVar[tuple[int, int] | None] = None
    containers: ClassVar[tuple[str, ...]] = ("gguf",)
    offered: ClassVar[bool] = True
    advice: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name or cls.gguf_id < 0:
            return
        if cls.name in _REGISTRY:
            raise ValueError(f"format {cls.name} is registered twice")
        _REGISTRY[cls.name] = cls
        _BY_GGUF_ID[cls.gguf_id] = cls

    @classmethod
    def block_bytes(cls) -> int:
        """Bytes of one block."""
        return cls.layout.itemsize

    @classmethod
    def bpw(cls) -> float:
        """Bits per weight."""
        return 8 * cls.block_bytes() / cls.elements

    @classmethod
    def symmetric(cls) -> bool:
        """Whether there is no minimum."""
        return cls.block_minimum is None

    @classmethod
    def fits(cls, row_length: int) -> bool:
        """Whether a row of ``row_length`` weights is a whole number of blocks."""
        return row_length > 0 and row_length % cls.elements == 0

    @classmethod
    def row_bytes(cls, row_length: int) -> int:
        """Bytes of one row of ``row_length`` weights.

        Raises FormatError if the row is not a whole number of blocks, naming the formats that fit.
        """
        if not cls.fits(row_length):
            fitting = ", ".join(f.name for f in formats() if f.fits(row_length))
            raise FormatError(
                f"a row of {row_length} weights is not a multiple of {cls.name}'s block of {cls.elements}",
                hint=f"formats that fit: {fitting}",
            )
        return row_length // cls.elements * cls.block_bytes()

    @classmethod
    def is_quantized(cls) -> bool:
        """Whether the format groups weights into blocks (F32, F16 and BF16 do not)."""
        return cls.elements > 1

    @classmethod
    def groups(cls) -> int:
        """Groups of a block that have a scale of their own."""
        return cls.scales.items(cls.layout) if cls.scales is not None else 1

    @classmethod
    def integers(cls) -> dict[str, Integers | Trits]:
        """The vectors of integers of a block, by name."""
        found = {
            "scales": cls.scales, "minimums": cls.minimums, "zeros": cls.zeros, "signs": cls.signs, "shifts": cls.shifts,
            "codes": cls.codes,
        }  # fmt: skip
        out: dict[str, Integers | Trits] = {name: part for name, part in found.items() if part is not None}
        if isinstance(cls.block_scale, Integers):
            out["block_scale"] = cls.block_scale
        return out

    @classmethod
    def unpack(cls, data: npt.NDArray[np.uint8]) -> dict[str, np.ndarray]:
        """Packed bytes as their integers and floating-point fields, each (blocks, items)."""
        blocks = cls.blocks(data)
        out: dict[str, np.ndarray] = {name: part.unpack(blocks) for name, part in cls.integers().items()}
        for name in (cls.block_scale, cls.block_minimum, cls.block_divisor):
            if isinstance(name, str):
                out[name] = blocks[name].copy()
        return out

    @classmethod
    def pack(cls, parts: dict[str, np.ndarray]) -> npt.NDArray[np.uint8]:
        """The inverse of ``unpack``: uint8 (blocks, block_bytes)."""
        blocks = np.zeros(len(parts["codes"]), cls.layout)
        for name, values in parts.items():
            if name in cls.integers():
                cls.integers()[name].pack(values, blocks)
            else:
                blocks[name] = values
        return blocks.view(np.uint8).reshape(len(blocks), -1)

    @classmethod
    def decode(cls, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Decode rows of packed bytes.

        data: uint8, shape (..., bytes). Returns float32, shape (..., bytes / block_bytes * elements).
        Raises FormatError if the last axis is not a whole number of blocks. Large arrays are decoded by
        compiled loops (loops_decode.py) that give the same bits.
        """
        data = np.ascontiguousarray(data, dtype=np.uint8)
        blocks = cls.blocks(data)
        if cls.codes is not None and len(blocks) * cls.elements >= COMPILED_FROM:
            from quantkit.formats.compiled import decoder

            values = np.empty((len(blocks), cls.elements), F32)
            decoder(cls)(data.reshape(len(blocks), cls.block_bytes()), values)  # type: ignore[arg-type]
        else:
            values = cls.decode_blocks(blocks)
        return values.reshape(*data.shape[:-1], data.shape[-1] // cls.block_bytes() * cls.elements)

    @classmethod
    def decode_blocks(cls, blocks: np.ndarray) -> npt.NDArray[np.float32]:
        """The plain decoder: a vector of ``layout`` records to float32, shape (blocks, elements)."""
        assert cls.codes is not None
        n, groups = len(blocks), cls.groups()
        out = cls._values(blocks).reshape(n, groups, cls.elements // groups)
        with np.errstate(over="ignore", invalid="ignore"):  # damaged scales may be infinite
            out *= cls.block_scales(blocks)[:, :, None]
            if cls.block_minimum is not None:
                out = out + cls.block_minimums(blocks)[:, :, None]
        return out.reshape(n, cls.elements)

    @classmethod
    def _values(cls, blocks: np.ndarray) -> npt.NDArray[np.float32]:
        """What the codes stand for, with signs and shifts: float32 (blocks, elements)."""
        assert cls.codes is not None
        codes = cls.codes.unpack(blocks)
        if isinstance(cls.values, Linear):
            if cls.zeros is not None:
                codes = codes.reshape(len(blocks), cls.groups(), -1) - cls.zeros.unpack(blocks)[:, :, None]
            out = (codes - cls.values.zero).astype(F32)
        elif isinstance(cls.values, Table):
            out = np.array(cls.values.entries, F32)[codes]
        else:
            out = grid(cls.values.name)[codes].astype(F32)  # (blocks, items, width)
            if cls.shifts is not None:
                down = cls.shifts.unpack(blocks).astype(F32)  # 0: up, 1: down
                shift = F32(cls.shift) * (1 - 2 * down)
                out = (out.reshape(len(blocks), down.shape[1], cls.elements // down.shape[1]) + shift[:, :, None]).astype(F32)
        out = out.reshape(len(blocks), cls.elements)
        if cls.signs is not None:
            bits = cls.signs.unpack(blocks)
            if bits.shape[1] < cls.elements:  # eight weights share seven bits
                bits = np.unpackbits(table("even_signs")[bits], axis=1, bitorder="little").astype(np.int32)
            out *= np.where(bits.reshape(out.shape), F32(-1), F32(1))
        return out

    @classmethod
    def block_minimums(cls, blocks: np.ndarray) -> npt.NDArray[np.float32]:
        """What is added to the weights of every group: float32 (blocks, groups), zeros where there is no minimum."""
        if cls.block_minimum is None:
            return np.zeros((len(blocks), cls.groups()), F32)
        minimum = blocks[cls.block_minimum].astype(F32)[:, None]
        if cls.minimums is not None:
            minimum = minimum * cls.minimums.unpack(blocks).astype(F32)
        return F32(cls.minimum_sign) * minimum

    @classmethod
    def block_scales(cls, blocks: np.ndarray) -> npt.NDArray[np.float32]:
        """The scale of every group: float32 (blocks, groups)."""
        if cls.scale_table is not None:
            assert cls.scales is not None
            found = table(cls.scale_table)[cls.scales.unpack(blocks)]
            return found if cls.block_divisor is None else found / blocks[cls.block_divisor][:, None]
        if isinstance(cls.block_scale, Integers):
            pieces = cls.block_scale.unpack(blocks)
            places = cls.block_scale.width * np.arange(pieces.shape[1])
            d = (pieces << places).sum(1).astype(np.uint16).view(np.float16).astype(F32)
        else:
            d = blocks[cls.block_scale]
            d = (d.astype(np.uint32) << np.uint32(16)).view(F32) if cls.scale_type == "BF16" else d.astype(F32)
        if cls.scales is None:
            return d[:, None]
        rule = cls.scale_rule
        found = F32(rule.offset) + F32(rule.step) * cls.scales.unpack(blocks).astype(F32)
        return d[:, None] * found * F32(rule.factor)

    @classmethod
    def blocks(cls, data: npt.NDArray[np.uint8]) -> np.ndarray:
        """Packed bytes as a vector of records."""
        data = np.ascontiguousarray(data, dtype=np.uint8)
        if data.shape[-1] % cls.block_bytes():
            raise FormatError(f"{data.shape[-1]} bytes are not a multiple of {cls.name}'s block of {cls.block_bytes()} bytes")
        return data.reshape(-1, cls.block_bytes()).view(cls.layout).reshape(-1)


def formats() -> list[type[Format]]:
    """All registered formats, from most to fewest bits."""
    _load()
    return sorted(_REGISTRY.values(), key=lambda f: (-f.bpw(), f.name))


def get_format(name: str) -> type[Format]:
    """The format of that name, in any case. Raises FormatError with the nearest names."""
    _load()
    return by_name(_REGISTRY, name, "format")


def by_name(registry: dict[str, T], name: str, kind: str) -> T:
    """The entry of that name, in any case. Raises FormatError with the nearest names."""
    found = registry.get(name.upper())
    if found is None:
        import difflib

        near = difflib.get_close_matches(name.upper(), registry, n=3) or sorted(registry)
        raise FormatError(f"unknown {kind} {name!r}", hint=f"did you mean {', '.join(near)}? `quantkit formats` lists all")
    return found


def format_by_gguf_id(gguf_id: int) -> type[Format] | None:
    """The format with that ``ggml_type`` number, or None if quantkit does not know it."""
    _load()
    return _BY_GGUF_ID.get(gguf_id)


def _load() -> None:
    """Import the modules whose classes fill the registry."""
    from quantkit.formats import floats, fp4, iquants, kquants, legacy, ternary  # noqa: F401
