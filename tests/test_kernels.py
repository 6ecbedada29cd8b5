"""Triton programs: in the interpreter against the decoders of ``formats``, and compiled ahead of time for a GPU.

Both run in processes of their own, because the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.errors import FormatError
from quantkit.formats import formats, get_format
from quantkit.kernels.dequantize import dequantize
from quantkit.kernels.product import matmul
from quantkit.kernels.source import decoder_source, fitted, pieces_of

HELP = Path(__file__).parent / "kernel_tools.py"
BLOCKED = [fmt for fmt in formats() if fmt.codes is not None]


def run(what: str, *names: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, HELP, what, *names], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("fmt", BLOCKED, ids=lambda fmt: fmt.name)
def test_pieces_cover_every_weight_once(fmt):
    numbers = np.concatenate([piece.elements.reshape(-1) for piece in pieces_of(fmt)])
    assert sorted(numbers) == list(range(fmt.elements))
    assert decoder_source(fmt).count("piece ==") == 2 * len(pieces_of(fmt))


def test_numbers_are_turned_back_into_arithmetic():
    rng = np.random.default_rng(0)
    q, i = np.arange(16)[:, None], np.arange(8)[None]
    for _ in range(50):
        a, b, c, d = (int(n) for n in rng.integers(-9, 99, 4))
        numbers = a + q // 4 * b + q % 4 * c + i * d
        assert (eval(fitted(numbers), {"q": q, "i": i}) + 0 * numbers == numbers).all()
    assert fitted(np.array([[7]])) == "7" and fitted(q * 8 + i) == "q * 8 + i"
    assert fitted(q * q + 0 * i) is None


def test_interpreted_programs_decode_to_the_bit():
    """All formats, odd numbers of blocks, outputs filled with NaN before: float32 exactly, float16 rounded; products too."""
    said = run("interpret", TRITON_INTERPRET="1")
    assert said.split() == [fmt.name for fmt in BLOCKED]


def test_programs_compile_for_a_gpu():
    """One format for each family of layouts, to sm_90: wide loads where blocks allow them, nothing in local memory."""
    said = run("compile", "Q4_K", "Q8_0", "Q6_K", "MXFP4", "IQ4_XS", "IQ2_S", "TQ2_0")
    facts = dict(line.split(" {") for line in said.splitlines())
    assert len(facts) == 14 and "LDG.E.128" in facts["Q4_K dequantize"]
    assert not any("LDL" in line or "STL" in line for line in facts.values())


def test_the_cpu_decodes_without_triton_and_bad_data_are_refused():
    fmt = get_format("Q4_K")
    rows = np.random.default_rng(0).integers(0, 60, (3, 2 * fmt.block_bytes())).astype(np.uint8)
    out = dequantize(torch.from_numpy(rows), fmt)
    assert np.array_equal(out.numpy(), fmt.decode(rows)) and out.shape == (3, 512)
    assert dequantize(torch.from_numpy(rows), fmt, torch.bfloat16).dtype == torch.bfloat16
    for data, words in (
        (torch.from_numpy(rows).int(), "int32"), (torch.from_numpy(rows)[:, ::2], "not contiguous"),
        (torch.from_numpy(rows)[:, :100].contiguous(), "144 bytes"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=words):
            dequantize(data, fmt)
    with pytest.raises(FormatError, match="float64"):
        dequantize(torch.from_numpy(rows), fmt, torch.float64)
    x = torch.randn(5, 2, 512)
    assert torch.allclose(matmul(x, torch.from_numpy(rows), fmt), x @ out.T)
    with pytest.raises(FormatError, match="do not fit rows of 512 weights"):
        matmul(torch.randn(5, 256), torch.from_numpy(rows), fmt)
