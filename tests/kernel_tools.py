"""Runs Triton's programs for tests/test_kernels.py, in a process of its own: ``interpret NAME…``, ``encode`` or ``compile TARGET NAME…``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from quantkit.formats import formats
from quantkit.formats.tensors.blocks import packed_format
from quantkit.kernels import dequantize as driver
from quantkit.kernels import product, repack
from quantkit.kernels.packing import Packing
from quantkit.kernels.settings import Settings, using

# What layers keep of safetensors files: one for each kind of scale, zero point and code.
IN_MEMORY = [
    "INT4_F32_16", "INT4_BF16_128", "UINT4_F16_128", "INT8_BF16_64", "NF4_F32_64", "E4M3_BF16_128", "E5M2_F32_32", "E2M1_E4M3_256",
]  # fmt: skip
BLOCKED = [fmt for fmt in formats() if fmt.codes is not None] + [packed_format(name) for name in IN_MEMORY]
SHARED = {75: 65_536, 80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}  # bytes that a program may have
EXACT = 1e-6  # float32 sums against float64, in shares of the sum of sizes


def packed(fmt, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes, with scales and minimums that are numbers: uint8 (blocks, bytes)."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (blocks, fmt.block_bytes())).astype(np.uint8)
    records = raw.view(fmt.layout).reshape(blocks)
    for field in (fmt.block_scale, fmt.block_minimum, fmt.block_divisor):
        if isinstance(field, str):
            number = 0.1 * rng.standard_normal(blocks) if field != fmt.block_divisor else rng.uniform(1, 9, blocks)
            records[field] = number.astype(np.float32).view(np.uint32) >> 16 if fmt.scale_type == "BF16" else number
    if fmt.float_bits is not None and fmt.codes.width == 8:  # codes that are numbers
        records["qs"][~np.isfinite(np.array(fmt.values.entries)[records["qs"]])] = 0
    if fmt.scale_table is not None:  # exponents near one
        at = int(next(iter(fmt.scales.positions(fmt.layout).flat))) // 8
        raw[:, at : at + fmt.groups()] = (
            rng.integers(50, 60, (blocks, fmt.groups())) if fmt.groups() > 1 else rng.integers(120, 130, (blocks, 1))
        )
    if fmt.name == "IQ1_M":  # its scale's bits are spread over four words
        raw[:, 48:56:2] &= 0xFF
        raw.view(np.uint8)[:, [49, 51, 53, 55]] = (raw[:, [49, 51, 53, 55]] & 0x0F) | np.array([0x00, 0x00, 0x80, 0x20], np.uint8)
    return raw


def matrix(fmt, rows: int, blocks: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Packed rows, uint8 (rows, bytes), and their weights in float64."""
    raw = packed(fmt, rows * blocks, seed).reshape(rows, -1)
    weight = fmt.decode(raw)
    assert np.isfinite(weight).all() and np.abs(weight).max() > 0, fmt.name
    return torch.from_numpy(raw), weight.astype(np.float64)


def near(found: torch.Tensor, x: torch.Tensor, weight: np.ndarray, what: str, extra=0.0) -> None:
    """Assert that ``found`` is x · weightᵀ within what its type and float32 sums round."""
    given = x.double().numpy()
    rounded = torch.from_numpy(weight).to(x.dtype).double().numpy()
    size = np.abs(given) @ np.abs(rounded).T + np.abs(extra)
    step = EXACT + (torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0)
    error = np.abs(found.double().numpy() - (given @ rounded.T + extra))
    assert (error <= step * size + 1e-30).all(), f"{what}: {np.max(error / size)}"


def interpret(names: list[str]) -> None:
    """Print every format whose programs give what the reference gives. Outputs are NaN before."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    torch.empty = lambda *a, **k: _poisoned(empty(*a, **k))
    torch.Tensor.new_empty = lambda self, *a, **k: _poisoned(new_empty(self, *a, **k))
    for name in names:
        torch.manual_seed(0)
        for planes in (False, True):
            packing = Packing(packed_format(name), planes)
            decode(packing)
            products(packing)
            experts(packing)
        print(name, flush=True)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def laid(raw: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Packed rows in the order that the packing says."""
    return repack.pack(raw, packing.format) if packing.planes else raw


def decode(packing: Packing) -> None:
    """All weights to the bit, rows by number, half precision, nothing at all."""
    fmt = packing.format
    raw, _ = matrix(fmt, 7, 3)
    expected = fmt.decode(raw.numpy())
    out = driver.dequantize(laid(raw, packing), packing).numpy()
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32)), fmt.name
    half = driver.dequantize(laid(raw, packing), packing, torch.float16)
    assert torch.equal(half, torch.from_numpy(expected).half()), fmt.name
    ids = torch.tensor([[6, 0], [3, 3]])
    assert torch.equal(driver.embedding(ids, laid(raw, packing), packing), torch.from_numpy(expected)[ids]), fmt.name
    assert driver.dequantize(raw[:0], packing).shape == (0, expected.shape[1])


def products(packing: Packing) -> None:
    """One matrix, an odd number of rows: few tokens, some, many, inputs that are not contiguous, low-rank addition."""
    name = packing.format.name
    raw, weight = matrix(packing.format, 13, 3)
    data = laid(raw, packing)
    wide = torch.randn(19, 2 * weight.shape[1])
    x = wide[:, ::2]
    near(product.matmul(x[:2].reshape(2, 1, -1), data, packing).reshape(2, 13), x[:2], weight, f"{name} few")
    thin, tall = torch.randn(2, 5), torch.randn(13, 5)
    near(
        product.matmul(x[:2], data, packing, thin, tall), x[:2], weight, f"{name} few, low rank", (thin @ tall.T).double().numpy()
    )
    near(product.matmul(x, data, packing), x, weight, f"{name} some")
    fits = 30000 / max(30000, (x.abs().double().numpy() @ np.abs(weight).T).max())  # E5M2's products pass 65504
    short = (fits * x).half()
    near(product.matmul(short, data, packing), short, weight, f"{name} some in half precision")
    low, up = torch.randn(19, 5), torch.randn(13, 5)
    near(product.matmul(x, data, packing, low, up), x, weight, f"{name} low rank", (low.double() @ up.double().T).numpy())
    back = torch.randn(19, 13)
    near(product.matmul_transposed(back, data, packing), back, weight.T, f"{name} transposed")
    with using(Settings(some=16)), patch.object(product, "PANEL", 5 * weight.shape[1]):
        near(product.matmul(x, data, packing), x, weight, f"{name} many")
        near(product.matmul_transposed(back, data, packing), back, weight.T, f"{name} many, transposed")


def experts(packing: Packing) -> None:
    """Three experts, one without tokens, forward and back; gate and up of two formats and what is made of them."""
    name, ends = packing.format.name, torch.tensor([3, 3, 21], dtype=torch.int32)
    raw, weight = matrix(packing.format, 3 * 13, 2)
    data, each = laid(raw, packing).reshape(3, 13, -1), weight.reshape(3, 13, -1)
    x, back = torch.randn(21, each.shape[2]), torch.randn(21, 13)
    out, out_back = product.grouped(x, data, packing, ends), product.grouped(back, data, packing, ends, transposed=True)
    other = Packing(packed_format("Q4_0"))
    raw_up, weight_up = matrix(other.format, 3 * 13, each.shape[2] // 32, seed=1)
    up = weight_up.reshape(3, 13, -1)
    made = product.swiglu(x, data, raw_up.reshape(3, 13, -1), (packing, other), ends)
    with patch.object(product, "multiplies_tiles", lambda _: False):  # as on an older GPU, or in float32
        near(product.grouped(x, data, packing, ends)[3:], x[3:], each[2], f"{name} experts without tiles")
        near(
            product.grouped(back, data, packing, ends, transposed=True)[3:],
            back[3:],
            each[2].T,
            f"{name} experts back without tiles",
        )
        if not packing.planes:  # rows of one expert can be taken out
            near(product.matmul(x, data[2].contiguous(), packing), x, each[2], f"{name} without tiles")
            near(
                product.matmul_transposed(back, data[2].contiguous(), packing),
                back,
                each[2].T,
                f"{name} transposed without tiles",
            )
    one = raw_up.reshape(3, 13, -1)[0].contiguous()
    assert product.swiglu(x.reshape(7, 3, -1), one, one, (other, other)).shape == (7, 3, 13)
    for expert, part in ((0, slice(0, 3)), (2, slice(3, 21))):
        near(out[part], x[part], each[expert], f"{name} experts")
        near(out_back[part], back[part], each[expert].T, f"{name} experts, transposed")
        gate, value = (x[part].double().numpy() @ w[expert].T for w in (each, up))
        sizes = [np.abs(x[part].double().numpy()) @ np.abs(w[expert]).T for w in (each, up)]
        with np.errstate(over="ignore"):
            expected = gate / (1 + np.exp(-gate)) * value
        error = np.abs(made[part].double().numpy() - expected)
        assert (error <= 4 * EXACT * (1 + sizes[0]) * sizes[1]).all(), f"{name} swiglu {error.max()}"


def hard_rows(columns: int = 512) -> np.ndarray:
    """Weights with zeros, constants, an outlier, tiny and subnormal values: float32 (rows, columns)."""
    rng = np.random.default_rng(0)
    x = (0.02 * rng.standard_t(4, (8, columns))).astype(np.float32)
    x[1] *= 1e-3
    x[2, :256] = 0
    x[3, :32], x[3, 32:64], x[3, 64:80] = 0.01, -0.01, 0
    x[4] *= 1e-18
    x[5, 5] = 3
    x[6, 0:420:7] = -x[6, 1:421:7]
    x[7] = np.round(x[7] * 64) / 64
    return x


def encode_all() -> None:
    """Print every format whose bytes from the GPU's encoder are those of the CPU's, with and without importance."""
    from quantkit.encoders import get_encoder
    from quantkit.kernels.encode import ENCODERS, encode

    x = hard_rows()
    importance = np.random.default_rng(1).gamma(0.5, 2.0, x.shape[1]).astype(np.float32)
    for name in ENCODERS:
        fmt = packed_format(name)
        for given in (None, importance):
            ours = encode(torch.from_numpy(x), fmt, None if given is None else torch.from_numpy(given)).numpy()
            theirs = get_encoder("ggml").encode(x, given, fmt)
            assert np.array_equal(ours, theirs), (name, given is not None, np.flatnonzero((ours != theirs).any(1)))
        print(name, flush=True)


def compile_ahead(target: int, names: list[str]) -> None:
    """Print for every program and format the loads and stores of its machine code, and the registers of a thread."""
    for what, (program, arguments) in encoders().items():
        print(json.dumps(["encode", what, machine_code(program, arguments, target)]), flush=True)
    for name in names:
        packing = Packing(packed_format(name), repack.gains(packed_format(name)))  # as it lies on a GPU
        for what, (program, arguments) in programs(packing, torch.float16 if target < 80 else torch.bfloat16, target).items():
            if target >= 80 or what in ("dequantize", "matvec"):  # the others are not used there
                print(json.dumps([name, what, machine_code(program, arguments, target)]), flush=True)


class Catch:
    """Stands for a program and keeps the arguments of its launch."""

    def __init__(self, name: str, program, caught: dict) -> None:
        self.name, self.program, self.caught = name, program, caught

    def __getitem__(self, grid):
        return lambda **arguments: self.caught.setdefault(self.name, (self.program, arguments))


def encoders() -> dict:
    """The programs that search scales, with the arguments of a launch."""
    from quantkit.kernels import programs_encode
    from quantkit.kernels.encode import ENCODERS

    caught: dict = {}
    x, importance = torch.from_numpy(hard_rows()), torch.ones(8, 512)
    names = ["ordered_sum", "affine_fit", "symmetric_fit", "positive_fit", "descent_fit"]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(programs_encode, name, Catch(name, getattr(programs_encode, name), caught)))
        ENCODERS["Q4_K"](x, importance)
        ENCODERS["Q3_K"](x, importance)
        ENCODERS["Q3_K"](x, None)
    return {name: caught[name] for name in names}


def programs(packing: Packing, dtype: torch.dtype, target: int) -> dict:
    """Every program with the arguments of a launch, caught instead of launched."""
    from quantkit.kernels import programs_dequantize, programs_product

    caught: dict = {}
    fmt = packing.format
    data = torch.zeros(2, 64, 4 * 256 // fmt.elements * fmt.block_bytes(), dtype=torch.uint8)
    x, ends = torch.zeros(128, 1024, dtype=dtype), torch.tensor([64, 128], dtype=torch.int32)
    names = {programs_dequantize: ["dequantize"], programs_product: ["matvec", "matmul", "swiglu", "matmul_transposed"]}
    with ExitStack() as stack:
        for module in (driver, product):
            stack.enter_context(patch.object(module, "on_host", lambda _: False))
        stack.enter_context(patch.object(product, "is_roomy", lambda _: target in (90, 100)))
        for module, some in names.items():
            for name in some:
                stack.enter_context(patch.object(module, name, Catch(name, getattr(module, name), caught)))
        driver.dequantize(data, packing, dtype)
        product.matmul(x[:1], data[0].contiguous(), packing)
        product.matmul(x, data[0].contiguous(), packing, x[:, :16], x[:64, :16])
        product.swiglu(x, data, data, (packing, packing), ends)
        product.matmul_transposed(x[:, :64], data[0].contiguous(), packing)
    return caught


def machine_code(program, arguments: dict, target: int) -> dict[str, int]:
    """Loads and stores of a program's machine code by kind, and its registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (tool,) = Path(triton.__file__).parent.rglob("cuobjdump")
    types = {
        torch.uint8: "*u8",
        torch.int64: "*i64",
        torch.int32: "*i32",
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
    }
    constant = {p.name for p in program.params if p.is_constexpr}
    signature, constants, aligned = {}, {}, {}
    for number, name in enumerate(program.arg_names):
        value = arguments[name]
        if name in constant or (isinstance(value, int) and value == 1):
            signature[name], constants[(number,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[(number,)] = types[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(number,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("enable_fp_fusion", "num_warps", "num_stages", "maxnreg") if name in arguments}
    made = triton.compile(
        ASTSource(program, signature, constants, aligned), target=GPUTarget("cuda", target, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    assert made.metadata.shared <= SHARED[target], (program.__name__, made.metadata.shared)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage.stdout + usage.stderr))
    return {**Counter(re.findall(r"\b((?:LD|ST)(?:G|L|GSTS)\b[.A-Z0-9]*)", sass)), "registers": registers}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret(sys.argv[2:])
    elif sys.argv[1] == "encode":
        encode_all()
    else:
        compile_ahead(int(sys.argv[2]), sys.argv[3:])
