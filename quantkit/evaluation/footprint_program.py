"""The process that ``footprint`` starts: MODEL RUNTIME DEVICE → one line of JSON, the footprint or an error."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.analysis.texts import read_text
from quantkit.checkpoint import Checkpoint, GgufCheckpoint
from quantkit.checkpoint.adapter import AdaptedCheckpoint
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.evaluation.candidates import open_candidate
from quantkit.evaluation.footprint import Footprint
from quantkit.evaluation.runners import gguf_of, llama_package, load_llama
from quantkit.evaluation.texts import default_texts
from quantkit.evaluation.tune import Workload
from quantkit.kernels.devices import default_dtype
from quantkit.modeling.packed import formats_of, packed_model, prepare
from quantkit.modeling.skeleton import empty_model
from quantkit.modeling.text import TextEncoder
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run as write_artifact
from quantkit.threads import default_threads

PROMPT, NEW = 512, 64
REPEATS, SECONDS = 5, 20.0  # the fastest of so many runs counts, of fewer if they take this long
Run = Callable[[], tuple[float, list[float]]]  # seconds of the prompt, of each token after it


def measure(checkpoint: Checkpoint, runtime: str, device: str) -> Footprint:
    """Load and run a model in this process, whose memory nothing else should use."""
    ids, count = prompt_of(checkpoint)
    _load_libraries(checkpoint, runtime)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_file_of(checkpoint)) if runtime == "llama" else None
        before, started = memory("VmRSS"), time.perf_counter()
        run = _torch(checkpoint, ids, count, device) if file is None else _llama(stack, *file, ids, count)
        loaded = time.perf_counter() - started
        run()  # compiles what has to be compiled
        runs = [run()]
        while len(runs) < REPEATS and time.perf_counter() - started < SECONDS:
            runs.append(run())
    peak = memory("VmHWM")
    used = None if before is None or peak is None else peak - before
    if device.startswith("cuda"):
        import torch

        peak = used = torch.cuda.max_memory_allocated(device)
    return Footprint(
        loaded, len(ids), len(ids) / min(run[0] for run in runs), count, count / min(sum(run[1]) for run in runs), peak, used
    )


def prompt_of(checkpoint: Checkpoint) -> tuple[list[int], int]:
    """Ids of a usual text and how many tokens to draw after them, within the model's context."""
    encoder = TextEncoder(checkpoint)
    context = int(checkpoint.config.get("max_position_embeddings") or PROMPT + NEW)
    length, count = min(PROMPT, context // 2), max(1, min(NEW, context // 4))
    windows = encoder.windows(read_text(default_texts()[0], encoder), length)
    if not windows:
        raise CalibrationError(f"the shipped text has fewer than {length} tokens of this model", hint="leave out --speed")
    return windows[0], count


def _load_libraries(checkpoint: Checkpoint, runtime: str) -> None:
    """All that loading a model imports, which takes longer than a small model."""
    if runtime == "llama":
        llama_package()
        return
    model = empty_model(checkpoint, cache=True)
    prepare(model, formats_of(checkpoint, model))


def _torch(checkpoint: Checkpoint, ids: list[int], count: int, device: str) -> Run:
    work = Workload(packed_model(checkpoint, default_dtype(device), device), ids, count, device)
    return lambda: work.run(work.model.forward)[:2]


def _llama(stack: contextlib.ExitStack, path: Path, adapter: Path | None, ids: list[int], count: int) -> Run:
    """llama.cpp as it runs by default, on all cores."""
    threads = default_threads()
    model: Any = stack.enter_context(
        contextlib.closing(load_llama(path, path.name, adapter, len(ids) + count, n_threads=threads, n_threads_batch=threads))
    )

    def run() -> tuple[float, list[float]]:
        model.reset()
        moments = [time.perf_counter()]
        tokens = model.generate(ids, temp=0.0)
        for _ in range(count + 1):
            next(tokens)
            moments.append(time.perf_counter())
        seconds = np.diff(moments).tolist()
        return seconds[0], seconds[1:]

    return run


@contextlib.contextmanager
def _file_of(checkpoint: Checkpoint) -> Iterator[tuple[Path, Path | None]]:
    """The GGUF, or one in the type that most weights of a folder have; and the adapter."""
    adapter = checkpoint.adapter.path if isinstance(checkpoint, AdaptedCheckpoint) else None
    source = checkpoint.source if isinstance(checkpoint, AdaptedCheckpoint) else checkpoint
    types = Counter({info.dtype: 0 for info in source.tensors.values()})
    for info in source.tensors.values():
        types[info.dtype] += info.size
    usual = types.most_common(1)[0][0]
    if isinstance(source, GgufCheckpoint):
        yield source.path, adapter
    elif usual not in source.plain_types:
        with gguf_of(source) as path:  # refuses it
            yield path, adapter
    else:
        with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
            path = Path(folder) / f"{source.path.resolve().name}-{usual}.gguf"
            write_artifact(source, uniform_plan(source, usual, None), path)
            yield path, adapter


def memory(field: str) -> int | None:
    """Bytes of this process: VmRSS now, VmHWM at most so far; None where there is no /proc."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def main() -> None:
    """Measure and print."""
    path, runtime, device = sys.argv[1:]
    try:
        found = measure(open_candidate(Path(path)), runtime, device).to_json()
    except QuantkitError as error:
        print(json.dumps({"error": error.what, "hint": error.hint}))
        sys.exit(1)
    print(found)


if __name__ == "__main__":
    main()
