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
from quantkit.kernels.decoders import decoder, tables


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
        print(fmt.name)


def compile_ahead(names: list[str]) -> None:
    """Print the loads and stores of the machine code of every format, compiled for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantkit.kernels.programs_dequantize import dequantize as program

    (tool,) = Path(triton.__file__).parent.rglob("cuobjdump")
    for name in names:
        fmt = get_format(name)
        made = decoder(fmt)
        constants = {
            "DECODE": made.decode, "WHERE": made.where, "PIECES": made.pieces, "ELEMENTS": fmt.elements, "BYTES": fmt.block_bytes(),
            "TOGETHER": max(1, driver.WEIGHTS // fmt.elements),
        }  # fmt: skip
        book = "*i64" if tables(fmt, "cpu")[0].dtype == torch.int64 else "*i32"
        signature = {
            "raw": "*u8",
            "out": "*bf16",
            "count": "i32",
            "book": book,
            "scales": "*fp32",
            **dict.fromkeys(constants, "constexpr"),
        }
        places = {key: program.arg_names.index(key) for key in signature}
        aligned = {(places[key],): [["tt.divisibility", 16]] for key in ("raw", "out", "book", "scales")}
        source = ASTSource(program, signature, {(places[key],): value for key, value in constants.items()}, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        moves = re.findall(r"\b((?:LD|ST)[GLS]\b[.A-Z0-9]*)", sass)
        print(name, dict(Counter(moves)))


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_ahead(sys.argv[2:])
