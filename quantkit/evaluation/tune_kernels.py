"""Which sizes of programs are fastest on this GPU: one setting after the other is varied, timed, and kept if it helps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from quantkit.checkpoint.files import write_text
from quantkit.encoders import get_encoder
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.kernels import repack
from quantkit.kernels.packed import Packing
from quantkit.kernels.settings import CANDIDATES, Settings, document, settings_path, using
from quantkit.progress import Progress
from quantkit.versions import package_versions

FORMATS = ("Q4_K", "Q6_K", "Q8_0", "MXFP4", "IQ4_XS", "IQ3_S")
SIDE = 4096  # rows and columns of the matrices
TOKENS = (0, 1, 2, 4, 8, 16, 64, 256, 512, 1024)  # 0: decoding alone
RUNS = 20
CLEARLY = 0.99  # a change must bring the mean of all workloads below this share


@dataclass
class Step:
    """One value tried. share: of the time that the settings before it take, mean over all workloads."""

    setting: str
    value: int
    share: float = 0.0
    kept: bool = False
    failed: str = ""


@dataclass
class KernelTuning:
    """The settings found on a device, and the way to them."""

    device: str
    settings: Settings
    steps: list[Step] = field(default_factory=list)


def workloads(device: str) -> list[Callable[[], Any]]:
    """Products and decoding of several formats, for the numbers of TOKENS."""
    import torch

    from quantkit.kernels import ops

    rows = np.random.default_rng(0).standard_normal((64, SIDE)).astype(np.float32)
    out: list[Callable[[], Any]] = []
    for name in FORMATS:
        fmt = get_format(name)
        data = torch.from_numpy(get_encoder("ggml").encode(rows, None, fmt)).repeat(SIDE // 64, 1).to(device)
        planes = repack.gains(fmt)
        data, packing = repack.pack(data, fmt) if planes else data, str(Packing(fmt, planes))
        for tokens in TOKENS:
            if not tokens:
                out.append(partial(ops.dequantize, data, packing, torch.bfloat16))
                continue
            x = torch.randn(tokens, SIDE, dtype=torch.bfloat16, device=device)
            out.append(partial(ops.linear, x, data, packing))
    return out


def seconds_on_gpu(work: Callable[[], Any]) -> float:
    """Median seconds of a call on the current GPU."""
    import torch

    work()
    found = []
    for _ in range(RUNS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return statistics.median(found)


def tune_kernels(device: str = "cuda", progress: Progress | None = None) -> KernelTuning:
    """Find and keep the settings of a GPU. Raises PlanError if there is none."""
    import torch

    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise PlanError(
            f"{device} is no GPU that torch can use",
            hint="on the CPU only the ways of compiling are tuned: quantkit tune MODEL --compile",
        )
    with torch.cuda.device(device):
        name = torch.cuda.get_device_name(device)
        found = search(workloads(device), seconds_on_gpu, name, progress)
    path = settings_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, document(found.settings, device=name, versions=package_versions("torch", "triton")))
    return found


def search(
    works: list[Callable[[], Any]], seconds: Callable[[Callable[[], Any]], float], name: str, progress: Progress | None = None
) -> KernelTuning:
    """One setting after the other: every candidate is timed on all workloads, and the best kept if it is clearly faster."""
    found = KernelTuning(name, Settings())
    task = (progress or Progress()).task("tune", total=sum(map(len, CANDIDATES.values())), unit="settings")

    def times(settings: Settings) -> list[float]:
        with using(settings):
            return [seconds(work) for work in works]

    before = times(found.settings)
    for setting, values in CANDIDATES.items():
        best: tuple[float, Step, list[float]] | None = None
        for value in values:
            step = Step(setting, value)
            found.steps.append(step)
            task.advance()
            try:
                now = times(replace(found.settings, **{setting: value}))
            except Exception as error:  # too many registers or too much shared memory: not for this GPU
                step.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                continue
            step.share = statistics.fmean(a / b for a, b in zip(now, before, strict=True))
            if step.share < CLEARLY and (best is None or step.share < best[0]):
                best = (step.share, step, now)
        if best is not None:
            best[1].kept, before = True, best[2]
            found.settings = replace(found.settings, **{setting: best[1].value})
    task.done()
    return found
