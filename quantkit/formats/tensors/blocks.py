"""Quantized weights of safetensors files as rows of blocks, as layers keep them in memory and kernels read them.

A block has the codes of some weights of a row, their scale and their zero point, so that one decoder source serves
files of both kinds. These formats are written to no file and are not registered; their names say what is in them:
``UINT4_F16_128`` has codes 0…15, a zero point and a half-precision scale for 128 weights. The numbers are those of the
stored tensors (but for the sign of zero in E2M1).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.formats.base import Format, get_format
from quantkit.formats.fp4 import E2M1_DOUBLED
from quantkit.formats.layout import Linear, Table, at, signed
from quantkit.formats.tensors.bitsandbytes import FP4_VALUES, NF4_VALUES
from quantkit.formats.tensors.minifloat import E4M3, E5M2, bfloat16_encode
from quantkit.formats.tensors.parts import Parts

SIZES = (128, 64, 32, 16)  # weights of a block
NVFP4_SIZES, NVFP4_GROUP = (256, 128, 64), 16
RUN = 32  # four-bit codes whose lower halves of a byte follow each other
NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
VALUES: dict[str, Linear | Table] = {
    "INT4": Linear(8), "UINT4": Linear(), "INT8": Linear(), "E2M1": E2M1_DOUBLED,
    "NF4": Table(tuple(float(v) for v in NF4_VALUES)), "FP4": Table(tuple(float(v) for v in FP4_VALUES)),
    "E4M3": Table(tuple(float(v) for v in E4M3.values)), "E5M2": Table(tuple(float(v) for v in E5M2.values)),
}  # fmt: skip
FLOATS = {"E4M3": (4, 3), "E5M2": (5, 2)}
_NAME = re.compile(r"(INT4|UINT4|INT8|NF4|FP4|E2M1|E4M3|E5M2)_(F32|F16|BF16|E4M3)_(\d+)", re.IGNORECASE)


def packed_format(name: str) -> type[Format]:
    """The format of packed rows in memory: one of this module, or a registered one. Raises FormatError if there is none."""
    found = _NAME.fullmatch(name)
    return block_format(found[1], found[2], int(found[3])) if found else get_format(name)


def block_format(element: str, scale: str, size: int) -> type[Format]:
    """The format of blocks of ``size`` weights. element, scale: as in ``Parts``; E4M3 scales (NVFP4) have a divisor."""
    return _block_format(element.upper(), scale.upper(), size)


@cache
def _block_format(element: str, scale: str, size: int) -> type[Format]:
    width, run = (8, 1) if element in ("INT8", *FLOATS) else (4, min(size // 2, RUN))
    codes = at("qs", width, run=run)
    facts: dict[str, Any] = {
        "__doc__": f"{element} codes, a scale in {scale} for {NVFP4_GROUP if scale == 'E4M3' else size} weights.",
        "name": f"{element}_{scale}_{size}", "elements": size, "codes": signed(codes) if element == "INT8" else codes,
        "values": VALUES[element], "float_bits": FLOATS.get(element), "containers": (), "offered": False,
    }  # fmt: skip
    if scale == "E4M3":
        fields: list[tuple[Any, ...]] = [("g", "<f4"), ("d", "u1", size // NVFP4_GROUP)]
        facts |= {
            "block_scale": None,
            "scales": at("d", 8),
            "scale_table": "e4m3_half",
            "block_divisor": "g",
            "scale_type": "F32",
        }
    else:
        fields = [("d", NUMBERS[scale])]
        facts["scale_type"] = scale
        if element == "UINT4":  # as long as the scale, so that scales stay aligned
            fields.append(("z", "u1", np.dtype(NUMBERS[scale]).itemsize))
            facts["zeros"] = at("z", 8, words=(0, 1, 1))
    facts["layout"] = np.dtype([*fields, ("qs", "u1", size * width // 8)])
    return type(facts["name"], (Format,), facts)


def to_blocks(parts: Parts) -> tuple[type[Format], npt.NDArray[np.uint8]] | None:
    """The format and the packed rows, uint8 (rows, bytes), that decode to ``parts.weight()``.

    None where no block fits: rows without a common group (GPTQ's activation order, a row's end in the middle of a
    block), and numbers that are not finite.
    """
    if not (np.isfinite(parts.scale).all() and np.isfinite(parts.values[parts.codes]).all()):
        return None
    rows, columns = parts.codes.shape
    if parts.scale_type == "E4M3":
        size = next((n for n in NVFP4_SIZES if columns % n == 0), 0)
        return _packed(parts, block_format(parts.element, "E4M3", size)) if size and parts.group == NVFP4_GROUP else None
    if parts.scale_type == "E8M0" and parts.element == "E2M1":
        assert parts.scale_codes is not None
        fmt = get_format("MXFP4")  # a registered format has just these blocks
        found = {"codes": parts.codes.reshape(-1, fmt.elements), "scales": parts.scale_codes.reshape(-1, 1)}
        return fmt, _rows(fmt.pack(found), rows)
    size = next((n for n in SIZES if parts.group % n == 0), 0)
    kind = "BF16" if parts.scale_type == "E8M0" else parts.scale_type  # which has all powers of two
    return _packed(parts, block_format(parts.element, kind, size)) if size else None


def _packed(parts: Parts, fmt: type[Format]) -> tuple[type[Format], npt.NDArray[np.uint8]]:
    """Rows of one of this module's formats."""
    rows, blocks = len(parts.codes), parts.codes.size // fmt.elements
    found: dict[str, np.ndarray] = {"codes": parts.codes.reshape(blocks, fmt.elements)}
    if fmt.block_divisor is not None:
        assert parts.scale_codes is not None and parts.divisor is not None
        found |= {"scales": parts.scale_codes.reshape(blocks, -1), fmt.block_divisor: np.full(blocks, parts.divisor, np.float32)}
    else:
        times = parts.group // fmt.elements  # blocks that share a scale
        scale = np.repeat(parts.scale, times, axis=1).reshape(-1)
        found["d"] = bfloat16_encode(scale) if fmt.scale_type == "BF16" else scale
        if parts.zero is not None:
            found["zeros"] = np.repeat(parts.zero, times, axis=1).reshape(-1, 1)
    return fmt, _rows(fmt.pack(found), rows)


def _rows(blocks: npt.NDArray[np.uint8], rows: int) -> npt.NDArray[np.uint8]:
    return blocks.reshape(rows, -1)
