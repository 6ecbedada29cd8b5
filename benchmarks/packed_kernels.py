"""Products with packed weights: on the CPU against ggml's decoder and torch, on a GPU against the limits of its memory.

    make bench-kernels                     # on what this machine has: kernels-cpu.json, or kernels-<GPU>.json
    python benchmarks/packed_kernels.py --only Q4_K Q6_K

Each row has the 20th, 50th and 80th percentile of its times. On the CPU the other side is ggml's C decoder on the same
threads followed by torch's product. On a GPU the cache is cleared before every timing; bytes moved are set against a
copy measured in the same run, products against torch's with bfloat16 weights; bitsandbytes and torchao stand beside
them where they are installed (kernel_peers.py). Not called kernels.py: transformers and bitsandbytes import a package of that name.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from common import ROOT, write_results
from kernel_peers import peers

from quantkit.evaluation.tune_kernels import runs_on_gpu
from quantkit.formats import Format, formats, get_format
from quantkit.formats.tensors.blocks import packed_format
from quantkit.kernels import ops, repack
from quantkit.kernels.encode import ENCODERS, encode
from quantkit.kernels.packing import Packing
from quantkit.versions import package_versions

Row = dict[str, Any]
CPU_SIDE, CPU_TOKENS, CPU_RUNS = 4096, (1, 4, 16, 64, 512), 15
GPU_ROWS, GPU_COLUMNS, GPU_RUNS = 28672, 8192, 60
DEQUANTIZED = ("Q4_K", "Q6_K", "Q8_0", "MXFP4", "IQ4_XS")
GPU_TOKENS = (1, 4, 16, 32, 64, 256, 2048, 8192)
EXPERTS, EXPERT_TOKENS, EXPERT_ROWS, EXPERT_COLUMNS = 256, 64, 4096, 2048
RANK = 16
IN_MEMORY = ("NF4_F32_64", "UINT4_F16_128", "E4M3_BF16_128")  # what layers keep of bitsandbytes, AWQ and FP8 folders


def percentiles(seconds: list[float]) -> Row:
    """Microseconds that a fifth, a half and four fifths of the runs stay under."""
    return {f"p{p}_us": round(float(np.percentile(seconds, p)) * 1e6, 1) for p in (20, 50, 80)}


def packed_rows(fmt: type[Format], *shape: int) -> torch.Tensor:
    """Random bytes with small, valid scales: uint8 (..., bytes). shape: (..., weights of a row)."""
    raw = torch.randint(0, 256, (*shape[:-1], fmt.row_bytes(shape[-1])), dtype=torch.uint8)
    blocks = raw.reshape(-1, fmt.block_bytes())
    for field in (fmt.block_scale, fmt.block_minimum):
        if isinstance(field, str):
            place = int(fmt.layout.fields[field][1])  # type: ignore[index]
            number = torch.tensor(
                [0.01], dtype={"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[fmt.scale_type]
            )
            blocks[:, place : place + number.element_size()] = number.view(torch.uint8)
    if fmt.float_bits == (4, 3):  # codes that are numbers
        blocks &= 0x7E
    if fmt.scale_table is not None:
        place = int(next(iter(fmt.scales.positions(fmt.layout).flat))) // 8  # type: ignore[union-attr]
        blocks[:, place : place + fmt.groups()] = 56 if fmt.groups() > 1 else 120
    return raw


# -- CPU ------------------------------------------------------------------------------------------


def timed_on_cpu(*functions: Callable[[], object]) -> list[list[float]]:
    """Seconds of the runs of each, taken in turns."""
    out: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(CPU_RUNS):
        for function, seconds in zip(functions, out, strict=True):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return out


def cpu_rows(names: list[str]) -> list[Row]:
    """Every format, a few numbers of tokens."""
    sys.path.insert(0, str(ROOT / "tests"))
    import oracle

    lib, threads, rows = oracle.library("runtime"), torch.get_num_threads(), []
    pool = ThreadPoolExecutor(threads)
    for name in names:
        fmt = get_format(name)
        data = packed_rows(fmt, CPU_SIDE, CPU_SIDE)
        packed, weight = data.numpy(), torch.empty(CPU_SIDE, CPU_SIDE)
        call = getattr(lib, f"dequantize_row_{name.lower().replace('_k', '_K')}")
        call.restype, call.argtypes = None, [ctypes.c_void_p, oracle.FLOAT_P, ctypes.c_int64]
        parts = [slice(i * CPU_SIDE // threads, (i + 1) * CPU_SIDE // threads) for i in range(threads)]

        def decode(part: slice, call: Any = call, packed: Any = packed, weight: torch.Tensor = weight) -> None:
            target = weight[part].numpy()
            call(packed[part].ctypes.data, target.ctypes.data_as(oracle.FLOAT_P), target.size)

        for tokens in CPU_TOKENS:
            x = torch.randn(tokens, CPU_SIDE)

            def theirs(decode: Any = decode, parts: Any = parts, weight: torch.Tensor = weight, x: torch.Tensor = x) -> None:
                list(pool.map(decode, parts))
                x @ weight.T

            ours, other = timed_on_cpu(lambda x=x, data=data, name=name: ops.linear(x, data, name), theirs)
            ratio = float(np.median(other) / np.median(ours))
            rows.append(
                {
                    "format": name,
                    "tokens": tokens,
                    **percentiles(ours),
                    "ggml_and_torch": percentiles(other),
                    "ratio": round(ratio, 2),
                }
            )
            print(
                f"{name:8} {tokens:4} tokens  {np.median(ours) * 1e3:8.2f} ms  {ratio:5.2f} × as fast as ggml's decoder and torch",
                flush=True,
            )
    return rows


# -- GPU ------------------------------------------------------------------------------------------


class Gpu:
    """Timings on a GPU with an empty cache, and the rate of a copy."""

    def __init__(self) -> None:
        big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(big)
        self.rate = 2 * big.numel() / float(np.median(self.seconds(lambda: target.copy_(big))))

    def seconds(self, function: Callable[[], object]) -> list[float]:
        """Of GPU_RUNS runs after three warm ones."""
        return runs_on_gpu(function, GPU_RUNS, warm=3)

    def row(self, what: str, name: str, shape: str, moved: int, function: Callable[[], object], against: Callable[[], object] | None = None) -> Row:  # fmt: skip
        """One row; moved: bytes that must be read and written."""
        try:
            seconds = self.seconds(function)
        except Exception as error:  # a kernel that fails is a row too
            return {"what": what, "format": name, "shape": shape, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
        found = {"what": what, "format": name, "shape": shape, **percentiles(seconds)}
        found["share_of_copy"] = round(moved / float(np.median(seconds)) / self.rate, 3)
        if against is not None:
            found["ratio"] = round(float(np.median(self.seconds(against)) / np.median(seconds)), 3)
        print(found, flush=True)
        return found


def on_gpu(name: str, *shape: int) -> tuple[torch.Tensor, str]:
    """Packed rows as a GPU keeps them, and how they are read."""
    fmt = packed_format(name)
    data, planes = packed_rows(fmt, *shape).cuda(), repack.gains(fmt)
    return repack.pack(data, fmt) if planes else data, str(Packing(fmt, planes))


def gpu_rows(names: list[str]) -> list[Row]:
    """Decoding, products of few and many tokens, experts, low-rank addition."""
    gpu, rows = Gpu(), []
    shape = f"{GPU_ROWS}x{GPU_COLUMNS}"
    plain = torch.randn(GPU_ROWS, GPU_COLUMNS, dtype=torch.bfloat16, device="cuda")
    for name in (*names, *IN_MEMORY):
        data, packing = on_gpu(name, GPU_ROWS, GPU_COLUMNS)
        if name in DEQUANTIZED:
            moved = data.numel() + 2 * plain.numel()
            rows.append(gpu.row("dequantize", name, shape, moved, lambda d=data, p=packing: ops.dequantize(d, p, torch.bfloat16)))
        for tokens in GPU_TOKENS:
            x = torch.randn(tokens, GPU_COLUMNS, dtype=torch.bfloat16, device="cuda")
            rows.append(gpu.row(
                "matmul", name, f"{tokens} x {shape}", data.numel(), lambda x=x, d=data, p=packing: ops.linear(x, d, p),
                lambda x=x: x @ plain.T,
            ))  # fmt: skip
    rows += [*peer_rows(gpu, plain), *expert_rows(gpu), *encoder_rows(gpu)]
    return [{"what": "copy", "bytes_per_second": gpu.rate}, *rows, *low_rank_rows(gpu)]


def peer_rows(gpu: Gpu, plain: torch.Tensor) -> list[Row]:
    """The same products by other libraries."""
    rows = []
    for name, product in peers(plain).items():
        if isinstance(product, str):
            rows.append({"what": "matmul", "format": name, "failed": product})
            continue
        for tokens in GPU_TOKENS:
            x = torch.randn(tokens, GPU_COLUMNS, dtype=torch.bfloat16, device="cuda")
            shape, moved = f"{tokens} x {GPU_ROWS}x{GPU_COLUMNS}", plain.numel() // 2
            rows.append(gpu.row("matmul", name, shape, moved, lambda x=x, p=product: p(x), lambda x=x: x @ plain.T))
    return rows


def encoder_rows(gpu: Gpu) -> list[Row]:
    """Encoding a matrix, with importance where the format uses it: weights a second."""
    weight = 0.02 * torch.randn(GPU_ROWS // 4, GPU_COLUMNS, device="cuda")
    importance, rows = torch.rand(GPU_COLUMNS, device="cuda"), []
    for name in ENCODERS:
        fmt = get_format(name)
        given = importance if fmt.uses_importance else None
        moved = weight.numel() * 4 + len(weight) * fmt.row_bytes(GPU_COLUMNS)
        shape = f"{len(weight)}x{GPU_COLUMNS}"
        row = gpu.row("encode", name, shape, moved, lambda fmt=fmt, given=given: encode(weight, fmt, given))
        if "p50_us" in row:
            row["gigaweights_per_second"] = round(weight.numel() / row["p50_us"] / 1e3, 2)
        rows.append(row)
    return rows


def expert_rows(gpu: Gpu) -> list[Row]:
    """256 experts in MXFP4, 64 tokens of 8 experts each."""
    data, packing = on_gpu("MXFP4", EXPERTS, EXPERT_ROWS, EXPERT_COLUMNS)
    chosen = torch.rand(EXPERT_TOKENS, EXPERTS, device="cuda").topk(8).indices.reshape(-1).sort().values
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
    x = torch.randn(len(chosen), EXPERT_COLUMNS, dtype=torch.bfloat16, device="cuda")
    moved = data.numel() * int(chosen.unique().numel()) // EXPERTS
    shape = f"{EXPERT_TOKENS} tokens x 8 of {EXPERTS} experts {EXPERT_ROWS}x{EXPERT_COLUMNS}"
    return [gpu.row("grouped", "MXFP4", shape, moved, lambda: ops.grouped(x, data, packing, ends))]


def low_rank_rows(gpu: Gpu) -> list[Row]:
    """Forward and backward with and without a rank of 16. ratio: base alone in shares of both."""
    data, packing = on_gpu("Q4_K", GPU_ROWS, GPU_COLUMNS)
    down = torch.randn(RANK, GPU_COLUMNS, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    up = torch.randn(GPU_ROWS, RANK, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    rows = []
    for tokens in (64, 2048):
        x = torch.randn(tokens, GPU_COLUMNS, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        grad = torch.randn(tokens, GPU_ROWS, dtype=torch.bfloat16, device="cuda")

        def both(x: torch.Tensor = x, grad: torch.Tensor = grad) -> None:
            ops.linear(x, data, packing, x @ down.T, up).backward(grad)

        def base(x: torch.Tensor = x, grad: torch.Tensor = grad) -> None:
            ops.linear(x, data, packing).backward(grad)

        rows.append(gpu.row(f"low rank {RANK}, forward and backward", "Q4_K", f"{tokens} tokens", 2 * data.numel(), both, base))
    return rows


def main() -> None:
    """Measure what this machine has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of formats")
    parser.add_argument("--cpu", action="store_true", help="the CPU although there is a GPU")
    given = parser.parse_args()
    names = [fmt.name for fmt in formats() if fmt.codes is not None and (not given.only or fmt.name in given.only)]
    if given.cpu or not torch.cuda.is_available():
        rows, where = cpu_rows(names), "cpu"
    else:
        rows, where = gpu_rows(names), torch.cuda.get_device_name().replace(" ", "-").lower()
    path = write_results(
        f"kernels-{where}", "python benchmarks/packed_kernels.py", rows, threads=torch.get_num_threads(),
        device=where, triton=package_versions("triton"),
    )  # fmt: skip
    print(f"written: {path}")


if __name__ == "__main__":
    main()
