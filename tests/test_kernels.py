"""Triton programs: in the interpreter against the decoders of ``formats``, and compiled ahead of time for GPUs.

Both run in processes of their own, because the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from kernel_tools import BLOCKED

from quantkit.cli import main
from quantkit.encoders import ggml
from quantkit.errors import FormatError
from quantkit.formats import get_format
from quantkit.kernels import repack
from quantkit.kernels.dequantize import dequantize, embedding
from quantkit.kernels.encode import ENCODERS, encode
from quantkit.kernels.packing import Packing
from quantkit.kernels.product import grouped, matmul, matmul_transposed, swiglu
from quantkit.kernels.source import decoder_source, fitted, pieces_of, planes_of

HELP = Path(__file__).parent / "kernel_tools.py"
FAMILIES = ["Q4_K", "Q8_0", "Q6_K", "MXFP4", "IQ4_XS", "IQ2_S", "TQ2_0"]  # one for each kind of layout
REGISTERS = 255  # of a thread at most: a program of 256 threads still fits the 65,536 of a multiprocessor


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
    halves = [[fmt.name for fmt in BLOCKED[start::2]] for start in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda names: run("interpret", *names, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"), halves)
        assert [names.split() for names in said] == halves


def test_interpreted_encoders_write_the_bytes_of_the_cpus():
    """K-quants, Q8_0 and FP4, on zeros, constants, outliers and tiny numbers, with and without importance."""
    assert run("encode", TRITON_INTERPRET="1").split() == list(ENCODERS)


def test_nothing_is_divided_by_a_number_of_python():
    """On a GPU torch multiplies by its reciprocal then, which is off in the last bit; the CPU's tests cannot see it."""
    tree = ast.parse(Path(encode.__code__.co_filename).read_text())
    sides = [
        side
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        for side in (node.left, node.right)
    ]
    tensors = {"value", "low", "step", "groups"}  # what is divided, and by what, comes from these
    named = [{name.id for name in ast.walk(side) if isinstance(name, ast.Name)} for side in sides]
    assert len(sides) == 10 and all(names & tensors for names in named), [ast.unparse(side) for side in sides]


def compiled(target: int, names: list[str]) -> dict[tuple[str, str], dict[str, int]]:
    return {(name, what): facts for name, what, facts in map(json.loads, run("compile", str(target), *names).splitlines())}


def test_programs_compile_for_a_gpu():
    """One format for each family of layouts, to sm_90: 128-bit loads, nothing in local memory, registers to spare."""
    facts = compiled(90, FAMILIES)
    assert len(facts) == 5 * len(FAMILIES) + 5
    for (name, what), found in facts.items():
        assert not any(kind.startswith(("LDL", "STL")) for kind in found), (name, what, found)
        assert found["registers"] <= REGISTERS, (name, what, found)
        if what == "dequantize" and name != "IQ2_S":  # code books are gathered
            assert found.get("LDG.E.128", 0) > 0, (name, found)
        if what in ("matmul", "swiglu"):
            assert any(kind.startswith("LDGSTS") and kind.endswith("128") for kind in found), (name, what, found)


@pytest.mark.slow
@pytest.mark.parametrize("target", [75, 80, 89, 90, 120])
def test_all_formats_compile_for_all_gpus(target):
    facts = compiled(target, [fmt.name for fmt in BLOCKED])
    assert len(facts) == len(BLOCKED) * (5 if target >= 80 else 2) + 5
    for key, found in facts.items():
        spilled = sum(count for kind, count in found.items() if kind.startswith(("LDL", "STL")))
        assert spilled <= (24 if key == ("TQ1_0", "swiglu") else 0), (key, found)  # of fourteen pieces
        assert found["registers"] <= REGISTERS, (key, found)


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
    weight = torch.zeros(2, 512)
    for bad, fmt, words in (
        (weight, "IQ2_S", "not encoded on a GPU"), (weight.half(), "Q4_K", "float16"), (weight[:, :100], "Q4_K", "multiple"),
        (weight + torch.nan, "Q4_K", "not finite"), (weight + 1e38, "Q8_0", "too large"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=words):
            encode(bad, get_format(fmt))
    with pytest.raises(FormatError, match="3 and 2 rows"):
        swiglu(torch.randn(5, 512), rows, rows[:2], (packing, packing))


def test_the_encoder_works_on_the_device_it_is_told(monkeypatch, tmp_path):
    """Only formats that a GPU encodes go there, and only meanwhile; a device that is not there is an error."""
    seen = []

    def elsewhere(x, importance, fmt, name):
        seen.append((fmt.name, importance is None))
        return np.zeros((len(x), fmt.row_bytes(x.shape[1])), np.uint8)

    monkeypatch.setattr(ggml, "_encode_there", elsewhere)
    real = ggml.require_device
    monkeypatch.setattr(ggml, "require_device", lambda device: None if device == "meta" else real(device))
    encoder, x = ggml.GgmlEncoder(), np.ones((2, 256), np.float32)
    before = encoder.encode(x, None, get_format("Q4_K"))
    with ggml.encoding_on("meta"):
        assert not encoder.encode(x, None, get_format("Q4_K")).any()
        assert encoder.encode(x, np.ones(256, np.float32), get_format("Q4_0")).any()
        with pytest.raises(FormatError, match="nan"):
            encoder.encode(x * np.nan, None, get_format("Q4_K"))
    assert seen == [("Q4_K", True)] and np.array_equal(encoder.encode(x, None, get_format("Q4_K")), before)
    with pytest.raises(FormatError, match="cannot work on cuda:9"), ggml.encoding_on("cuda:9"):
        pass
    done = CliRunner().invoke(
        main, ["quantize", str(tiny.DENSE), "Q4_K_M", "--device", "cuda:9", "-o", str(tmp_path / "q.gguf"), "--no-imatrix"]
    )
    assert done.exit_code == 1 and "cannot work on cuda:9" in done.stderr and not list(tmp_path.iterdir())
