"""bitsandbytes' 4-bit formats (QLoRA): blocks of 64 weights share an absolute maximum, NF4 or FP4 codes.

Blocks run over the flattened weight and may cross rows. With double quantization (``bnb_4bit_use_double_quant``)
the maxima, less their mean, are themselves kept in 8 bits, 256 of them sharing one float32 maximum. What is not
a tensor (type, shape, the mean) lies in ``quant_state``: JSON as bytes.

Sources: Dettmers et al., "QLoRA" (arXiv 2305.14314); bitsandbytes 0.50, functional.py (QuantState.as_dict),
backends/default/ops.py (4-bit rounding) and the CPU kernel of quantize_blockwise (8-bit rounding).
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.errors import FormatError
from quantkit.formats.tensors.base import F32, Shape, TensorFormat, TensorLayout
from quantkit.formats.tensors.parts import Parts
from quantkit.formats.tensors.words import HIGH_FIRST, pack, unpack

BLOCK, NESTED_BLOCK = 64, 256
_CHUNK = BLOCK << 12  # weights rounded at a time
_NUMBER = 24  # characters kept for the mean in JSON: no float32 prints longer

# Quantiles of the standard normal distribution, an exact zero and both ends (QLoRA, appendix E).
NF4_VALUES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], F32
)  # fmt: skip
# A sign bit and three bits of magnitude over 12, in the order of the codes.
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], F32) / F32(12)
FP4_VALUES = np.concatenate([_FP4_MAGNITUDES, F32(0) - _FP4_MAGNITUDES])


@cache
def dynamic_map() -> npt.NDArray[np.float32]:
    """The signed "dynamic" 8-bit table (Dettmers, arXiv 1511.04561), ascending, float32 (256,).

    Seven decades from 1e-6 to 1; decade i is cut into 2^i equal parts, of which the centres are kept.
    """
    numbers = [F32(0), F32(1)]
    for decade in range(7):
        edges = _even_steps(2**decade)
        centres = F32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / F32(2))
        numbers += [*centres, *-centres]
    return np.sort(np.array(numbers, F32))


def _even_steps(parts: int) -> npt.NDArray[np.float32]:
    """``torch.linspace(0.1, 1, parts + 1)`` to the bit: a float32 step, counted from the nearer end, rounded once."""
    step, index = float((F32(1) - F32(0.1)) / F32(parts)), np.arange(parts + 1)
    edges = np.where(index < (parts + 1) // 2, float(F32(0.1)) + step * index, 1 - step * (parts - index))
    return edges.astype(F32)


@cache
def _dynamic_codes() -> npt.NDArray[np.uint8]:
    """Code of the table's nearest entry for each of 65,536 even steps from −1 to 1.

    bitsandbytes' CPU kernel rounds to these steps first, so tiny numbers may miss the nearest entry.
    """
    steps = np.arange(65536) * (2 / 65535) - 1
    table = dynamic_map().astype(np.float64)
    return np.searchsorted((table[:-1] + table[1:]) / 2, steps).astype(np.uint8)


class _FourBit(TensorFormat):
    """w = absmax · value[q]."""

    element_bits, group = 4, BLOCK
    loads_in = ("transformers", "vLLM")
    source = "bitsandbytes 0.50 (github.com/bitsandbytes-foundation/bitsandbytes); QLoRA, arXiv 2305.14314"
    values: ClassVar[np.ndarray]  # by code
    nested: ClassVar[bool] = False

    @classmethod
    def _layout(cls, rows, columns):
        weights = rows * columns
        blocks = math.ceil(weights / BLOCK)
        out = {
            "weight": TensorLayout("U8", (math.ceil(weights / 2), 1)),
            "weight.absmax": TensorLayout("U8" if cls.nested else "F32", (blocks,)),
            "weight.quant_map": TensorLayout("F32", (16,)),
        }
        if cls.nested:
            out["weight.nested_absmax"] = TensorLayout("F32", (math.ceil(blocks / NESTED_BLOCK),))
            out["weight.nested_quant_map"] = TensorLayout("F32", (256,))
        return out | {cls._state_name(): TensorLayout("U8", (len(cls._state((rows, columns), F32(0))),))}

    @classmethod
    def _shape_matches(cls, name: str, found: Shape, expected: Shape) -> bool:
        return len(found) == 1 if name == cls._state_name() else found == expected

    @classmethod
    def _misfit(cls, shape: Shape) -> str:
        return "it must be a matrix of rows and columns" if len(shape) != 2 or min(shape) < 1 else ""

    @classmethod
    def _encode(cls, weight):
        absmax, scaled = _normalized(weight.reshape(-1))
        codes = np.concatenate([cls._nearest(scaled[at : at + _CHUNK]) for at in range(0, scaled.size, _CHUNK)])
        out = {
            "weight": pack(codes, 4, "u1", HIGH_FIRST)[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": cls.values.copy(),
        }
        mean = F32(0)
        if cls.nested:
            # In float64: bitsandbytes' float32 mean depends on the machine's order of adding.
            mean = F32(absmax.mean(dtype=np.float64))
            out["weight.absmax"], out["weight.nested_absmax"] = _encode_absmax(absmax - mean)
            out["weight.nested_quant_map"] = dynamic_map().copy()
        return out | {cls._state_name(): np.frombuffer(cls._state(weight.shape, mean), np.uint8).copy()}

    @classmethod
    def _parts(cls, tensors, shape):
        state = cls._read_state(tensors[cls._state_name()], shape)
        absmax = tensors["weight.absmax"]
        if cls.nested:
            nested = np.repeat(tensors["weight.nested_absmax"], NESTED_BLOCK)[: absmax.size]
            absmax = tensors["weight.nested_quant_map"][absmax] * nested + F32(state["nested_offset"])
        codes = unpack(tensors["weight"].reshape(-1), 4, math.prod(shape), HIGH_FIRST).reshape(shape)
        group = math.gcd(shape[1], BLOCK)  # weights of a row that certainly lie in one block
        scale = absmax[np.arange(0, codes.size, group) // BLOCK].reshape(len(codes), -1)
        return Parts(cls.element.upper(), codes, cls.values, scale, "F32")

    @classmethod
    def _nearest(cls, scaled: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Code of the nearest value of numbers in −1…1; the lower value wins a tie."""
        order = np.argsort(cls.values, kind="stable")
        ascending = cls.values[order]
        return order.astype(np.uint8)[np.searchsorted((ascending[:-1] + ascending[1:]) / F32(2), scaled)]

    @classmethod
    def _state_name(cls) -> str:
        return f"weight.quant_state.bitsandbytes__{cls.element}"

    @classmethod
    def _state(cls, shape: tuple[int, int], mean: np.float32) -> bytes:
        """The JSON of ``quant_state``, the same length for every mean: spaces at its end, which parsers skip."""
        state: dict[str, object] = {"quant_type": cls.element, "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
        if not cls.nested:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
        length = len(json.dumps(state)) - len("0.0") + _NUMBER
        return json.dumps(state | {"nested_offset": float(mean)}).ljust(length).encode()

    @classmethod
    def _read_state(cls, data: npt.NDArray[np.uint8], shape: tuple[int, int]) -> dict:
        """The parsed ``quant_state``. Raises FormatError if it is damaged or describes another weight."""
        try:
            state = json.loads(data.tobytes())
            found = {key: state[key] for key in ("quant_type", "blocksize", "shape")}
            if cls.nested:
                found["nested_blocksize"] = state["nested_blocksize"]
                float(state["nested_offset"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{cls.name}'s tensor {cls._state_name()!r} is damaged: {error!r}") from None
        expected = {"quant_type": cls.element, "blocksize": BLOCK, "shape": list(shape)}
        expected |= {"nested_blocksize": NESTED_BLOCK} if cls.nested else {}
        if found != expected:
            raise FormatError(f"{cls.name}'s tensor {cls._state_name()!r} says {found} and should say {expected}")
        return state


def _normalized(flat: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The blocks' absolute maxima, and all weights divided by theirs (an odd number gets a zero at its end)."""
    tiny, whole = F32(1e-38), flat.size // BLOCK * BLOCK
    scaled = np.zeros(flat.size + flat.size % 2, F32)
    blocks, rest = flat[:whole].reshape(-1, BLOCK), flat[whole:]
    absmax = np.abs(blocks).max(axis=1)
    np.multiply(blocks, (F32(1) / np.maximum(absmax, tiny))[:, None], out=scaled[:whole].reshape(-1, BLOCK))
    if rest.size:  # bitsandbytes multiplies whole blocks by the reciprocal and divides the last, short one
        absmax = np.append(absmax, np.maximum(np.abs(rest).max(), tiny))
        scaled[whole : flat.size] = rest / absmax[-1]
    return absmax, np.clip(scaled, -1, 1, out=scaled)


def _encode_absmax(centred: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Maxima less their mean as 8-bit codes, uint8 (n,), and one maximum for 256 of them, float32 (ceil(n / 256),)."""
    short = -centred.size % NESTED_BLOCK
    blocks = np.pad(centred, (0, short)).reshape(-1, NESTED_BLOCK)
    largest = np.abs(blocks).max(axis=1)
    inverse = F32(1) / largest
    usable = (largest > 0) & np.isfinite(inverse)
    scaled = blocks * np.where(usable, inverse, F32(0))[:, None]
    codes = _dynamic_codes()[((scaled + F32(1)) * F32(32767.5) + F32(0.5)).astype(np.int32).clip(0, 65535)]
    codes[~usable] = 0
    return codes.reshape(-1)[: centred.size], largest


class NF4(_FourBit):
    """4-bit NormalFloat: sixteen levels at quantiles of a normal distribution."""

    name, element, values = "NF4", "nf4", NF4_VALUES


class NF4_DQ(_FourBit):
    """NF4 with double quantization of the maxima, QLoRA's format."""

    name, element, values, nested = "NF4_DQ", "nf4", NF4_VALUES, True


class FP4(_FourBit):
    """bitsandbytes' own 4-bit float: E2M1 but for its smallest number (0.0052 where E2M1 has 0.083)."""

    name, element, values = "FP4", "fp4", FP4_VALUES


class FP4_DQ(_FourBit):
    """FP4 with double quantization of the maxima."""

    name, element, values, nested = "FP4_DQ", "fp4", FP4_VALUES, True
