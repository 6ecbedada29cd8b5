"""Triton programs: in the interpreter against the decoders of ``formats``, and compiled ahead of time for GPUs.

Both run in processes of their own, because the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.errors import FormatError
from quantkit.formats import formats, get_format
from quantkit.kernels import repack
from quantkit.kernels.dequantize import dequantize, embedding
from quantkit.kernels.packed import Packing
from quantkit.kernels.product import grouped, matmul, matmul_transposed, swiglu
from quantkit.kernels.source import decoder_source, fitted, pieces_of, planes_of

HELP = Path(__file__).parent / "kernel_tools.py"
BLOCKED = [fmt for fmt in formats() if fmt.codes is not None]
FAMILIES = ["Q4_K", "Q8_0", "Q6_K", "MXFP4", "IQ4_XS", "IQ2_S", "TQ2_0"]  # one for each kind of layout
REGISTERS = 240  # of a thread at most; a program has 256 threads and a multiprocessor 65,536 registers


def run(what: str, *names: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, HELP, what, *names], capture_output=True, text=True, env={**os.environ, **environment}, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("fmt", BLOCKED, ids=lambda fmt: fmt.name)
def test_pieces_cover_every_weight_once(fmt):
    numbers = np.concatenate([piece.elements.reshape(-1) for piece in pieces_of(fmt)])
    assert sorted(numbers) == list(range(fmt.elements))
    assert decoder_source(fmt).count("piece ==") == 3 * len(pieces_of(fmt))


@pytest.mark.parametrize("fmt", BLOCKED, ids=lambda fmt: fmt.name)
def test_repacking_is_undone_exactly_and_aligns_every_plane(fmt):
    data = torch.randint(0, 256, (3, 5, 16 * fmt.block_bytes()), dtype=torch.uint8)
    moved = repack.pack(data, fmt)
    assert moved.shape == data.shape and torch.equal(repack.unpack(moved, fmt), data)
    planes, start = planes_of(fmt), 0
    assert sum(plane.size for plane in planes) == fmt.block_bytes()
    for plane in planes:
        assert start % plane.alignment == 0
        start += plane.size
    assert repack.gains(fmt) == (fmt.block_bytes() % 16 != 0)


def test_numbers_are_turned_back_into_arithmetic():
    rng = np.random.default_rng(0)
    q, i = np.arange(16)[:, None], np.arange(8)[None]
    for _ in range(50):
        a, b, c, d = (int(n) for n in rng.integers(-9, 99, 4))
        numbers = a + q // 4 * b + q % 4 * c + i * d
        assert (eval(fitted(numbers), {"q": q, "i": i}) + 0 * numbers == numbers).all()
    assert fitted(np.array([[7]])) == "7" and fitted(q * 8 + i) == "q * 8 + i"
    assert fitted(q * q + 0 * i) is None


def test_interpreted_programs_give_what_the_reference_gives():
    """All formats as in the file and repacked, odd sizes, outputs filled with NaN before: decoding to the bit, float16
    rounded, rows by number, products of all kinds within what float32 sums round."""
    said = run("interpret", *(fmt.name for fmt in BLOCKED), TRITON_INTERPRET="1")
    assert said.split() == [fmt.name for fmt in BLOCKED]


def compiled(target: int, names: list[str]) -> dict[tuple[str, str], dict[str, int]]:
    return {(name, what): facts for name, what, facts in map(json.loads, run("compile", str(target), *names).splitlines())}


def test_programs_compile_for_a_gpu():
    """One format for each family of layouts, to sm_90: 128-bit loads, nothing in local memory, registers to spare."""
    facts = compiled(90, FAMILIES)
    assert len(facts) == 5 * len(FAMILIES)
    for (name, what), found in facts.items():
        assert not any(kind.startswith(("LDL", "STL")) for kind in found), (name, what, found)
        assert found["registers"] <= REGISTERS, (name, what, found)
        if what == "dequantize" and name != "IQ2_S":  # code books are gathered
            assert found.get("LDG.E.128", 0) > 0, (name, found)
        if what in ("matmul", "swiglu"):
            assert any(kind.startswith("LDGSTS") and kind.endswith("128") for kind in found), (name, what, found)


@pytest.mark.slow
@pytest.mark.parametrize("target", [75, 80, 89, 90])
def test_all_formats_compile_for_all_gpus(target):
    facts = compiled(target, [fmt.name for fmt in BLOCKED])
    assert len(facts) == len(BLOCKED) * (5 if target >= 80 else 2)
    for key, found in facts.items():
        assert not any(kind.startswith(("LDL", "STL")) for kind in found) and found["registers"] <= 255, (key, found)


def test_bad_data_are_refused():
    packing = Packing.of("Q4_K")
    rows = torch.randint(0, 60, (3, 288), dtype=torch.uint8)
    assert str(Packing.of("Q6_K:planes")) == "Q6_K:planes" and str(packing) == "Q4_K"
    for data, words in ((rows.int(), "int32"), (rows[:, ::2], "not contiguous"), (rows[:, :100].contiguous(), "144 bytes")):
        with pytest.raises(FormatError, match=words):
            dequantize(data, packing)
    with pytest.raises(FormatError, match="float64"):
        dequantize(rows, packing, torch.float64)
    with pytest.raises(FormatError, match="no blocks"):
        dequantize(rows, Packing(get_format("F16")))
    with pytest.raises(FormatError, match="Q9_K"):
        Packing.of("Q9_K")
    with pytest.raises(FormatError, match="do not fit rows of 512 weights"):
        matmul(torch.randn(5, 256), rows, packing)
    with pytest.raises(FormatError, match="the transpose of"):
        matmul_transposed(torch.randn(5, 512), rows, packing)
    with pytest.raises(FormatError, match="on meta"):
        matmul(torch.randn(5, 512, device="meta"), rows, packing)
    with pytest.raises(FormatError, match="row numbers"):
        embedding(torch.tensor([0]), rows[None], packing)
    for ends in (torch.tensor([5]), torch.tensor([1, 2, 5], device="meta")):
        with pytest.raises(FormatError, match="do not fit experts"):
            grouped(torch.randn(5, 512), rows[None].expand(3, 3, 288).contiguous(), packing, ends)
    with pytest.raises(FormatError, match="3 and 2 rows"):
        swiglu(torch.randn(5, 512), rows, rows[:2], (packing, packing))
