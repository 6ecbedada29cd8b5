"""What every multi-tensor format shares: its tensors by name, checks, sizes, and the registry.

A GGUF format packs a weight into self-contained blocks; here codes, scales and zero points are tensors of
their own. Their names, types and shapes are those of the library that loads them. Encoding is plain
round-to-nearest under that library's own scale rule, in float32; the scale is rounded to its stored type
first, so that codes are nearest for the scale that decoding will use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError
from quantkit.formats.base import by_name
from quantkit.formats.tensors.minifloat import bfloat16_encode
from quantkit.formats.tensors.parts import Parts

F32 = np.float32
Tensors = dict[str, np.ndarray]
Shape = tuple[int, ...]

# safetensors' name of a type → how NumPy holds it; types that NumPy lacks are held as their bits.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"),
    "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip

_REGISTRY: dict[str, type[TensorFormat]] = {}


@dataclass(frozen=True)
class TensorLayout:
    """Type (safetensors' name) and shape of one stored tensor."""

    dtype: str
    shape: Shape

    def numpy(self) -> np.dtype:
        """The NumPy type of the array that holds the bits."""
        return DTYPES[self.dtype]

    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.numpy().itemsize


class TensorFormat:
    """What the tensors of one quantized weight mean. Not instantiated: the class is the value.

    Class attributes
    ----------------
    name: the name users know.
    element: what a code is (``int4``, ``nf4``, ``e2m1``, …); element_bits: its bits.
    group: weights along a row that share a scale; 0 is the whole row or the whole tensor.
    symmetric: there is no zero point, or it is the middle code everywhere.
    containers: file kinds that can hold the format.
    loads_in: programs documented to load it.
    source: where the layout and the scale rule are written down.
    """

    name: ClassVar[str] = ""
    element: ClassVar[str] = ""
    element_bits: ClassVar[int] = 0
    group: ClassVar[int] = 0
    symmetric: ClassVar[bool] = True
    containers: ClassVar[tuple[str, ...]] = ("safetensors",)
    loads_in: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            return
        if cls.name in _REGISTRY:
            raise ValueError(f"format {cls.name} is registered twice")
        _REGISTRY[cls.name] = cls

    @classmethod
    def layout(cls, shape: Shape) -> dict[str, TensorLayout]:
        """The tensors of a weight of ``shape`` (rows, columns), by the suffix of their name.

        Raises FormatError if the shape does not fit, naming the group sizes and formats that do.
        """
        reason = cls._misfit(shape)
        if reason:
            groups = sorted({f.group for f in _REGISTRY.values() if f.group and f.fits(shape) and shape[1] % f.group == 0})
            fitting = ", ".join(f.name for f in tensor_formats() if f.fits(shape))
            sizes = f"group sizes that fit: {', '.join(map(str, groups))}; " if groups else ""
            raise FormatError(
                f"{cls.name} cannot hold a weight of shape {shape}: {reason}",
                hint=f"{sizes}formats that fit: {fitting or 'none'}",
            )
        return cls._layout(*shape)

    @classmethod
    def fits(cls, shape: Shape) -> bool:
        """Whether a weight of ``shape`` (rows, columns) can be held."""
        return not cls._misfit(shape)

    @classmethod
    def nbytes(cls, shape: Shape) -> int:
        """Bytes of all tensors of a weight of ``shape``. Raises FormatError like ``layout``."""
        return sum(tensor.nbytes() for tensor in cls.layout(shape).values())

    @classmethod
    def bpw(cls, shape: Shape) -> float:
        """Bits per weight of ``shape``, all tensors counted. Raises FormatError like ``layout``."""
        return 8 * cls.nbytes(shape) / math.prod(shape)

    @classmethod
    def encode(cls, weight: npt.NDArray[np.float32]) -> Tensors:
        """Round a weight to the format.

        weight: float32 (rows, columns), left as it is. Returns the arrays that ``layout`` describes.
        Raises FormatError for a shape that does not fit, for NaN and infinity (naming the first index), and
        for a scale outside its stored type.
        """
        cls.layout(weight.shape)
        weight = np.ascontiguousarray(weight, F32)
        if not np.isfinite(weight).all():
            row, column = np.argwhere(~np.isfinite(weight))[0].tolist()
            raise FormatError(f"weight[{row}, {column}] is {weight[row, column]}", hint="NaN and infinity cannot be quantized")
        with np.errstate(all="ignore"):
            return cls._encode(weight)

    @classmethod
    def decode(cls, tensors: Tensors, shape: Shape) -> npt.NDArray[np.float32]:
        """The weight of ``shape`` that the tensors stand for, float32 (rows, columns).

        The product of code and scale is not rounded further; runtimes round it to the type they compute in.
        Any bits decode: codes that mean NaN or infinity give just that. Tensors that the format does not
        know are ignored. Raises FormatError for one that is missing or of another type or shape, by name.
        """
        return cls.parts(tensors, shape).weight()

    @classmethod
    def parts(cls, tensors: Tensors, shape: Shape) -> Parts:
        """Codes, scales and zero points of the weight of ``shape``. Raises FormatError like ``decode``."""
        for name, expected in cls.layout(shape).items():
            if name not in tensors:
                raise FormatError(
                    f"{cls.name} needs the tensor {name!r}", hint=f"there are {', '.join(sorted(tensors)) or 'none'}"
                )
            found = tensors[name]
            if found.dtype != expected.numpy() or not cls._shape_matches(name, found.shape, expected.shape):
                raise FormatError(
                    f"{cls.name}'s tensor {name!r} is {found.dtype} {found.shape} and should be {expected.dtype} {expected.shape} "
                    f"(held as {expected.numpy()}) for a weight of shape {shape}"
                )
        with np.errstate(all="ignore"):
            return cls._parts(tensors, (shape[0], shape[1]))

    @classmethod
    def _shape_matches(cls, name: str, found: Shape, expected: Shape) -> bool:
        """Whether a stored tensor may have this shape."""
        return found == expected

    @classmethod
    def _misfit(cls, shape: Shape) -> str:
        """Why a weight of ``shape`` cannot be held; empty if it can."""
        if len(shape) != 2 or min(shape) < 1:
            return "it must be a matrix of rows and columns"
        if cls.group and shape[1] % cls.group:
            return f"a row of {shape[1]} weights is not a multiple of the group of {cls.group}"
        return ""

    @classmethod
    def _layout(cls, rows: int, columns: int) -> dict[str, TensorLayout]:
        raise NotImplementedError

    @classmethod
    def _encode(cls, weight: npt.NDArray[np.float32]) -> Tensors:
        raise NotImplementedError

    @classmethod
    def _parts(cls, tensors: Tensors, shape: tuple[int, int]) -> Parts:
        raise NotImplementedError


def bfloat16_scale(scale: np.ndarray) -> npt.NDArray[np.uint16]:
    """Scales as bfloat16 bits; zero becomes float32's epsilon, which is compressed-tensors' scale of zeros."""
    stored = bfloat16_encode(scale)
    stored[stored == 0] = bfloat16_encode(np.finfo(F32).eps)
    return stored


def finite_scale(fmt: type[TensorFormat], scale: np.ndarray, stored: str) -> None:
    """Raise FormatError if a scale left the range of its stored type, naming the first one."""
    if not np.isfinite(scale).all():
        where = np.argwhere(~np.isfinite(scale))[0].tolist()
        raise FormatError(
            f"{fmt.name}: the weights of group {where} are too large for a scale in {stored}",
            hint="choose a format with wider scales",
        )


def tensor_formats() -> list[type[TensorFormat]]:
    """All registered formats, from most to fewest bits of an element, then by name."""
    _load()
    return sorted(_REGISTRY.values(), key=lambda f: (-f.element_bits, f.name))


def get_tensor_format(name: str) -> type[TensorFormat]:
    """The format of that name, in any case. Raises FormatError with the nearest names."""
    _load()
    return by_name(_REGISTRY, name, "safetensors format")


def _load() -> None:
    """Import the modules whose classes fill the registry."""
    from quantkit.formats.tensors import bitsandbytes, floats8, integers, microscaling  # noqa: F401
