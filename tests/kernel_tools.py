"""Runs Triton's programs for tests/test_kernels.py, in a process of its own: ``interpret`` or ``compile NAME…``."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from quantkit.formats import formats, get_format
from quantkit.kernels import dequantize as driver
from quantkit.kernels import product
from quantkit.kernels.decoders import decoder, tables
from quantkit.kernels.source import pieces_of


def packed(fmt, blocks: int) -> np.ndarray:
    """Random bytes, with scales and minimums that are numbers."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (blocks, fmt.block_bytes())).astype(np.uint8)
    for field in (fmt.block_scale, fmt.block_minimum):
        if isinstance(field, str):
            at = int(fmt.layout.fields[field][1])
            raw[:, at : at + 2] = (0.1 * rng.standard_normal(blocks)).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    return raw


def interpret() -> None:
    """Print every format whose decoded weights have the bits of Format.decode."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    for fmt in formats():
        if fmt.codes is None:
            continue
        raw = packed(fmt, 21)
        expected = fmt.decode(raw)
        out = driver.dequantize(torch.from_numpy(raw), fmt)
        assert np.array_equal(out.numpy().view(np.uint32), expected.view(np.uint32)), fmt.name
        half = driver.dequantize(torch.from_numpy(raw), fmt, torch.float16)
        assert np.array_equal(half.numpy(), torch.from_numpy(expected).half().numpy(), equal_nan=True), fmt.name
        assert driver.dequantize(torch.zeros(0, fmt.block_bytes(), dtype=torch.uint8), fmt).shape == (0, fmt.elements)
        multiply(fmt)
        print(fmt.name)


def multiply(fmt) -> None:
    """Products of few tokens, an odd number of rows, against float64: within what float32 sums round."""
    raw = packed(fmt, 13 * 3).reshape(13, -1)
    weight = fmt.decode(raw).astype(np.float64)
    x = torch.randn(2, 1, weight.shape[1])
    with np.errstate(invalid="ignore"):
        expected = x.double().numpy() @ weight.T
        size = np.abs(x.double().numpy()) @ np.abs(weight).T
    found = product.matmul(x, torch.from_numpy(raw), fmt).numpy()
    rows = np.isfinite(weight).all(1)
    assert rows.any() or fmt.name == "IQ1_M", fmt.name  # random bytes are no numbers everywhere
    assert found.shape == (2, 1, 13) and (np.abs(found - expected) <= 1e-6 * size)[..., rows].all(), fmt.name


def compile_ahead(names: list[str]) -> None:
    """Print the loads and stores of the machine code of every program and format, compiled for sm_90."""
    from quantkit.kernels.programs_dequantize import dequantize
    from quantkit.kernels.programs_product import matvec

    for name in names:
        fmt = get_format(name)
        made = decoder(fmt)
        shared = {
            "DECODE": made.decode,
            "WHERE": made.where,
            "PIECES": made.pieces,
            "ELEMENTS": fmt.elements,
            "BYTES": fmt.block_bytes(),
        }
        pointers = {
            "raw": "*u8",
            "book": "*i64" if tables(fmt, "cpu")[0].dtype == torch.int64 else "*i32",
            "scales": "*fp32",
            "out": "*bf16",
        }
        moves = machine_code(
            dequantize, pointers, {"count": "i32"}, {**shared, "TOGETHER": max(1, driver.WEIGHTS // fmt.elements)}
        )  # fmt: skip
        print(name, "dequantize", moves)
        shapes = {piece.elements.shape for piece in pieces_of(fmt)}
        constants = {
            **shared, "SHAPE": shapes.pop() if len(shapes) == 1 else None, "ROWS": product.ROWS,
            "TOGETHER": max(1, product.WEIGHTS // fmt.elements),
        }  # fmt: skip
        print(name, "matvec", machine_code(matvec, {**pointers, "x": "*bf16"}, {"rows": "i32", "blocks": "i32"}, constants))


def machine_code(program, pointers: dict, numbers: dict, constants: dict) -> dict[str, int]:
    """Loads and stores of a program's machine code, by kind."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (tool,) = Path(triton.__file__).parent.rglob("cuobjdump")
    kinds = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds[name] for name in program.arg_names}
    places = {name: (number,) for number, name in enumerate(program.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(program, signature, {places[name]: value for name, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return dict(Counter(re.findall(r"\b((?:LD|ST)[GLS]\b[.A-Z0-9]*)", sass)))


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_ahead(sys.argv[2:])
