"""Which sizes of programs are fastest on this GPU: one setting after the other is varied, timed, and kept if it helps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.checkpoint.files import write_text
from quantkit.encoders import get_encoder
from quantkit.errors import PlanError
from quantkit.formats import formats, get_format
from quantkit.kernels import repack
from quantkit.kernels.devices import require_device
from quantkit.kernels.packing import Packing
from quantkit.kernels.settings import CANDIDATES, Settings, document, settings_path, using
from quantkit.progress import Progress
from quantkit.versions import package_versions

if TYPE_CHECKING:
    import torch

FORMATS = ("Q4_K", "Q6_K", "Q8_0", "MXFP4", "IQ4_XS", "IQ3_S")
SIDE = 4096  # rows and columns of the matrices that are timed
TOKENS = (1, 2, 4, 8, 16, 64, 256, 512, 1024)
MIDDLE = 64  # tokens of the other products
EXPERTS = 8
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


Work = Callable[[], Any]


def packed(name: str, side: int, device: str) -> tuple[torch.Tensor, str]:
    """(rows as a GPU keeps them, how they are read): a random matrix of ``side`` rows and columns."""
    import torch

    fmt = get_format(name)
    rows = np.random.default_rng(0).standard_normal((64, side)).astype(np.float32)
    importance = np.ones(side, np.float32) if fmt.needs_importance else None
    data = torch.from_numpy(get_encoder("ggml").encode(rows, importance, fmt)).repeat(side // 64, 1).to(device)
    planes = repack.gains(fmt)
    return repack.pack(data, fmt) if planes else data, str(Packing(fmt, planes))


def works_of(name: str, side: int, tokens: tuple[int, ...], device: str) -> list[Work]:
    """Decoding, products of these numbers of tokens, and one of each other kind."""
    import torch

    from quantkit.kernels import ops

    data, packing = packed(name, side, device)
    inputs = {n: torch.randn(n, side, dtype=torch.bfloat16, device=device) for n in (*tokens, MIDDLE)}
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=device) * (MIDDLE // EXPERTS)
    experts = data.reshape(EXPERTS, side // EXPERTS, -1)
    x = inputs[MIDDLE]
    return [
        partial(ops.dequantize, data, packing, torch.bfloat16), *(partial(ops.linear, inputs[n], data, packing) for n in tokens),
        partial(ops.linear_transposed, x, data, packing), partial(ops.swiglu, x, data, data, packing, packing),
        partial(ops.grouped, x, experts, packing, ends), partial(ops.swiglu, x, experts, experts, packing, packing, ends),
    ]  # fmt: skip


def runs_on_gpu(work: Work, runs: int, warm: int = 1) -> list[float]:
    """Seconds of calls on the current GPU, whose cache is cleared before each, after some that are not timed."""
    import torch

    flush = _flush()
    for _ in range(warm):
        work()
    found = []
    for _ in range(runs):
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return found


def seconds_on_gpu(work: Work) -> float:
    """Median seconds of a call on the current GPU."""
    return statistics.median(runs_on_gpu(work, RUNS))


@cache
def _flush() -> torch.Tensor:
    """More bytes than any cache has."""
    import torch

    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def tune_kernels(device: str = "cuda", progress: Progress | None = None) -> KernelTuning:
    """Find and keep the settings of a GPU. Raises PlanError if there is none."""
    import torch

    if device == "cpu":
        raise PlanError("the CPU has no programs to tune", hint="only ways of compiling: quantkit tune MODEL --compile")
    require_device(device)
    with torch.cuda.device(device):
        name = torch.cuda.get_device_name(device)
        timed = [work for fmt in FORMATS for work in works_of(fmt, SIDE, TOKENS, device)]
        blocked = [fmt.name for fmt in formats() if fmt.codes is not None]
        others = [work for fmt in blocked for work in works_of(fmt, 512, (1, MIDDLE), device)]
        found = search(timed, seconds_on_gpu, name, progress, others)
    path = settings_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, document(found.settings, device=name, versions=package_versions("torch", "triton")))
    return found


def search(
    works: list[Work], seconds: Callable[[Work], float], name: str, progress: Progress | None = None, others: Sequence[Work] = ()
) -> KernelTuning:
    """One setting after the other: every candidate is timed on all workloads, and the best kept if it is clearly faster.

    others: calls that must not fail either.
    """
    found = KernelTuning(name, Settings())
    task = (progress or Progress()).task("tune", total=sum(map(len, CANDIDATES.values())), unit="settings")

    def times(settings: Settings) -> list[float]:
        with using(settings):
            for work in others:
                work()
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
