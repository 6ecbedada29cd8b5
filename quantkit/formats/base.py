"""One class per format: its block layout as data, its decode, and the registry.

A format is declared by subclassing :class:`Format`; the subclass registers itself. The layout is a
NumPy structured dtype, so that decoders, encoders and kernels all take offsets from the same place.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError

F32 = np.float32

_REGISTRY: dict[str, type[Format]] = {}
_BY_GGUF_ID: dict[int, type[Format]] = {}


class Format:
    """What the bytes of one quantized type mean. Not instantiated: the class is the value.

    Class attributes
    ----------------
    name: the name users know, as llama.cpp prints it in upper case (``Q4_K``).
    gguf_id: ``ggml_type`` number in a GGUF file.
    elements: weights in one block.
    layout: structured dtype of one block; its item size is the bytes per block.
    symmetric: there is no per-block minimum.
    has_zero: some code decodes to exactly zero in every block.
    fallback: name of the format llama.cpp uses when a row is not a multiple of ``elements``.
    containers: file kinds that can hold the format.
    """

    name: ClassVar[str] = ""
    gguf_id: ClassVar[int] = -1
    elements: ClassVar[int] = 1
    layout: ClassVar[np.dtype]
    symmetric: ClassVar[bool] = True
    has_zero: ClassVar[bool | None] = None  # None: as ``symmetric``
    fallback: ClassVar[str | None] = None
    containers: ClassVar[tuple[str, ...]] = ("gguf",)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
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
    def decode(cls, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Decode rows of packed bytes.

        data: uint8, shape (..., bytes). Returns float32, shape (..., bytes / block_bytes * elements).
        Raises FormatError if the last axis is not a whole number of blocks.
        """
        data = np.ascontiguousarray(data, dtype=np.uint8)
        if data.shape[-1] % cls.block_bytes():
            raise FormatError(f"{data.shape[-1]} bytes are not a multiple of {cls.name}'s block of {cls.block_bytes()} bytes")
        blocks = data.reshape(-1, cls.block_bytes()).view(cls.layout).reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            values = cls._decode_blocks(blocks)
        return values.reshape(*data.shape[:-1], -1)

    @classmethod
    def _decode_blocks(cls, blocks: np.ndarray) -> npt.NDArray[np.float32]:
        """Decode a vector of ``layout`` records to float32, shape (blocks, elements)."""
        raise NotImplementedError


def formats() -> list[type[Format]]:
    """All registered formats, from most to fewest bits."""
    _load()
    return sorted(_REGISTRY.values(), key=lambda f: (-f.bpw(), f.name))


def get_format(name: str) -> type[Format]:
    """The format of that name, in any case. Raises FormatError with the nearest names."""
    _load()
    found = _REGISTRY.get(name.upper())
    if found is None:
        import difflib

        near = difflib.get_close_matches(name.upper(), _REGISTRY, n=3) or sorted(_REGISTRY)
        raise FormatError(f"unknown format {name!r}", hint=f"did you mean {', '.join(near)}? `quantkit formats` lists all")
    return found


def format_by_gguf_id(gguf_id: int) -> type[Format] | None:
    """The format with that ``ggml_type`` number, or None if quantkit does not know it."""
    _load()
    return _BY_GGUF_ID.get(gguf_id)


def _load() -> None:
    """Import the modules whose classes fill the registry."""
    from quantkit.formats import floats, iquants, kquants, legacy  # noqa: F401
