"""Which way of compiling a packed model is fastest here: every way is run, checked against the plain one, and timed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.files import write_text
from quantkit.errors import PlanError
from quantkit.jit import cache_root
from quantkit.kernels.devices import default_dtype
from quantkit.modeling.packed import packed_model
from quantkit.modeling.products import fast_float32
from quantkit.modeling.text import TextEncoder
from quantkit.progress import Progress
from quantkit.versions import package_versions

VERSION = 1
PLAIN = "not compiled"
CLEARLY = 0.98  # a way must take at most this share of the plain time to be chosen
TOLERANCE = 0.02  # of the spread of the logits, that a compiled model may be off by


@dataclass(frozen=True)
class Way:
    """Arguments of torch.compile; None: not compiled. gpu: makes sense on a GPU only."""

    name: str
    arguments: dict[str, Any] | None = None
    gpu: bool = False


WAYS = (
    Way(PLAIN),
    Way("default", {}),
    Way("dynamic shapes", {"dynamic": True}),
    Way("fixed shapes", {"dynamic": False}),
    Way("CUDA graphs (reduce-overhead)", {"mode": "reduce-overhead"}, gpu=True),
    Way("max-autotune without CUDA graphs", {"mode": "max-autotune-no-cudagraphs"}),
    Way("max-autotune", {"mode": "max-autotune"}, gpu=True),
    Way("no epilogue fusion", {"options": {"epilogue_fusion": False}}),
    Way("coordinate descent", {"options": {"coordinate_descent_tuning": True}}, gpu=True),
)


@dataclass
class Trial:
    """One way, measured. seconds: to the first token and per token (medians); compile_seconds: of the first run beyond that.

    memory: bytes at most (of the GPU, or None). graphs: compiled. recompiles: beyond the one for a single token.
    failed: why it cannot be chosen.
    """

    way: str
    prompt_seconds: float = 0.0
    token_seconds: float = 0.0
    compile_seconds: float = 0.0
    memory: int | None = None
    graphs: int = 0
    recompiles: int = 0
    failed: str = ""


@dataclass
class Tuning:
    """All trials of a model on a device, and the way chosen."""

    model: str
    identity: str
    device: str
    prompt_tokens: int
    tokens: int
    chosen: str
    trials: list[Trial] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document."""
        return json.dumps({"quantkit_tuning": VERSION, **asdict(self)}, indent=1)


def tuning_path(identity: str, device: str) -> Path:
    """Where the tuning of a model on a device is kept, by versions of torch."""
    name = "-".join([device, identity, "torch" + package_versions("torch").get("torch", "")])
    return cache_root() / "tune" / f"{''.join(c if c.isalnum() or c in '.-' else '-' for c in name)}.json"


def device_name(device: str) -> str:
    """The GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def tuned_arguments(identity: str, device: str) -> dict[str, Any] | None:
    """The arguments of torch.compile that an earlier tuning chose; None for a plain run.

    Raises PlanError if the model was not tuned on the device with this torch, or the file is damaged.
    """
    path = tuning_path(identity, device_name(device))
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return next(way.arguments for way in WAYS if (way.name, VERSION) == (known["chosen"], known["quantkit_tuning"]))
    except FileNotFoundError:
        raise PlanError(f"the model was not tuned on {device_name(device)}", hint="run quantkit tune MODEL --compile") from None
    except (ValueError, KeyError, TypeError, StopIteration):
        raise PlanError(f"{path} is damaged", hint="run quantkit tune MODEL --compile again") from None


class Workload:
    """A prompt and some tokens after it, with one cache of fixed size, always the same tokens."""

    def __init__(self, model: Any, ids: list[int], tokens: int, device: str) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.tokens = model, tokens
        self.ids = torch.tensor([ids], device=device)
        self.follow = self.ids[:, -1:]
        self.cache = StaticCache(config=model.config, max_cache_len=len(ids) + tokens)

    def run(self, step: Callable[..., Any]) -> tuple[float, list[float], Any]:
        """(seconds to the first token, seconds of each further one, last logits). The prompt is never compiled."""
        import torch

        def wait() -> None:
            if self.ids.is_cuda:
                torch.cuda.synchronize(self.ids.device)

        seconds = []
        with torch.inference_mode(), fast_float32():
            self.cache.reset()
            for number in range(self.tokens + 1):
                wait()
                started = time.perf_counter()
                run, given = (step, self.follow) if number else (self.model.forward, self.ids)
                logits = run(input_ids=given, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
                wait()
                seconds.append(time.perf_counter() - started)
        return seconds[0], seconds[1:], logits[0, -1].float().clone()


def tune(
    checkpoint: Checkpoint, prompt: str, tokens: int = 32, device: str = "cpu", ways: tuple[Way, ...] | None = None,
    progress: Progress | None = None,
) -> Tuning:  # fmt: skip
    """Try every way that makes sense on ``device`` and keep the fastest, in a file that ``generate --compile`` reads.

    A way that fails, computes something else or is not clearly faster than the plain run is never chosen. Raises
    PlanError if the prompt is empty.
    """
    import torch

    ids = TextEncoder(checkpoint).prompt(prompt)
    if not ids:
        raise PlanError("the prompt is empty", hint="give some text")
    model = packed_model(checkpoint, default_dtype(device), device)
    work = Workload(model, ids, tokens, device)
    reference = work.run(model.forward)[2]
    sensible = [way for way in ways or WAYS if torch.device(device).type == "cuda" or not way.gpu]
    trials = []
    task = (progress or Progress()).task("compile and run", total=len(sensible), unit="ways")
    for way in sensible:
        trials.append(_trial(way, model, work, reference))
        task.advance()
    task.done()
    plain = next(trial for trial in trials if trial.way == PLAIN)
    fast = [t for t in trials if not t.failed and t.token_seconds <= CLEARLY * plain.token_seconds]
    chosen = min(fast, key=lambda trial: trial.token_seconds, default=plain)
    found = Tuning(
        checkpoint.path.name, checkpoint.identity, device_name(device), len(ids), tokens, chosen.way, trials,
        package_versions("torch", "transformers", "triton"),
    )  # fmt: skip
    path = tuning_path(checkpoint.identity, found.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, found.to_json())
    return found


def _trial(way: Way, model: Any, work: Workload, reference: Any) -> Trial:
    """Compile, run, compare."""
    import torch
    from torch._dynamo.utils import counters

    trial = Trial(way.name)
    torch._dynamo.reset()
    counters.clear()
    cuda = work.ids.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats(work.ids.device)
    try:
        step = model.forward if way.arguments is None else torch.compile(model.forward, fullgraph=True, **way.arguments)
        started = time.perf_counter()
        work.run(step)
        first = time.perf_counter() - started
        runs = [work.run(step) for _ in range(3)]
    except Exception as error:  # whatever the compiler throws is a result here
        trial.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return trial
    trial.prompt_seconds = statistics.median(run[0] for run in runs)
    trial.token_seconds = statistics.median(second for run in runs for second in run[1])
    trial.compile_seconds = max(0.0, first - statistics.median(run[0] + sum(run[1]) for run in runs))
    trial.memory = torch.cuda.max_memory_allocated(work.ids.device) if cuda else None
    trial.graphs = counters["stats"]["unique_graphs"]
    trial.recompiles = max(0, trial.graphs - 1)
    off = float((runs[-1][2] - reference).abs().max() / reference.std())
    if cuda and counters["inductor"]["cudagraph_skips"]:
        trial.failed = "torch made no CUDA graphs of it"
    if not off <= TOLERANCE:
        trial.failed = f"its logits are off by {100 * off:.1f} % of their spread"
    return trial
