"""Runs a model over token windows and gives logits: through torch, or through llama.cpp."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, GgufCheckpoint
from quantkit.checkpoint.adapter import AdaptedCheckpoint
from quantkit.errors import CheckpointError, MissingDependencyError
from quantkit.modeling.packed import packed_model
from quantkit.modeling.skeleton import materialized_model
from quantkit.planning.standard import uniform_plan
from quantkit.quantizer.pipeline import run as write_artifact


def ran_on(runtime: str, device: str) -> str:
    """How reports name where a model ran: the runtime, and the device unless it is the CPU (``torch on cuda:0``)."""
    return runtime if device == "cpu" else f"{runtime} on {device}"


def runtime_and_device(ran: str) -> tuple[str, str]:
    """What `ran_on` was made of."""
    runtime, _, device = ran.partition(" on ")
    return runtime, device or "cpu"


class Runner(Protocol):
    """A loaded model."""

    def logits(self, ids: npt.NDArray[np.int64]) -> Any:
        """Logits of every position of one window, torch float32 (window, vocabulary). ids: (window,)."""

    def close(self) -> None:
        """Free the model."""


class TorchRunner:
    """transformers' modules, float32; decoded weights, or (packed) those of a quantized file or folder as they are."""

    def __init__(self, checkpoint: Checkpoint, packed: bool = False, device: str = "cpu") -> None:
        packed = packed or device != "cpu"
        self._model = packed_model(checkpoint, device=device) if packed else materialized_model(checkpoint)
        self._device = device

    def logits(self, ids: npt.NDArray[np.int64]) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(ids)[None].to(self._device), use_cache=False).logits[0].cpu()

    def close(self) -> None:
        self._model = None


class LlamaRunner:
    """llama.cpp through llama-cpp-python: F32 KV cache, flash attention off, all logits kept."""

    def __init__(self, checkpoint: Checkpoint, window: int) -> None:
        self._stack = contextlib.ExitStack()
        self._model = self._stack.enter_context(open_llama(checkpoint, window, n_ubatch=window, logits_all=True))

    def logits(self, ids: npt.NDArray[np.int64]) -> Any:
        import torch

        self._model.reset()
        self._model.eval(ids.tolist())
        return torch.from_numpy(np.array(self._model.scores[: len(ids)], np.float32))

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def open_llama(checkpoint: Checkpoint, window: int, **options: Any) -> Iterator[Any]:
    """llama-cpp-python's model for up to ``window`` tokens, without its shortcuts in attention; options: more of its own.

    Raises MissingDependencyError, and CheckpointError if llama.cpp cannot load it.
    """
    adapter = checkpoint.adapter.path if isinstance(checkpoint, AdaptedCheckpoint) else None
    source = checkpoint.source if isinstance(checkpoint, AdaptedCheckpoint) else checkpoint
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False, **options}
    with gguf_of(source) as path, contextlib.closing(load_llama(path, source.path.name, adapter, window, **exact)) as model:
        yield model


def load_llama(path: Path, name: str, adapter: Path | None, window: int, **options: Any) -> Any:
    """llama-cpp-python's model for up to ``window`` tokens, to be closed. name: for errors. Raises as ``open_llama``."""
    try:
        return llama_package().Llama(
            str(path), n_ctx=window, n_batch=window, verbose=False, lora_path=None if adapter is None else str(adapter), **options
        )
    except ValueError as error:
        raise CheckpointError(f"llama.cpp cannot load {name} ({error})", hint="try --runtime torch") from None


def llama_package() -> Any:
    """llama-cpp-python. Raises MissingDependencyError without it."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingDependencyError(
            "--runtime llama needs llama-cpp-python", hint='in the checkout: pip install -e ".[llama]"'
        ) from None
    return llama_cpp


@contextlib.contextmanager
def gguf_of(checkpoint: Checkpoint) -> Iterator[Path]:
    """A GGUF that llama.cpp runs without rounding activations to BF16: the file itself, or an F32 copy."""
    plain = all(info.dtype in checkpoint.plain_types for info in checkpoint.tensors.values())
    if not plain and not isinstance(checkpoint, GgufCheckpoint):
        raise CheckpointError(f"llama.cpp cannot read the folder {checkpoint.path.name}", hint="use --runtime torch")
    exact = isinstance(checkpoint, GgufCheckpoint) and (
        not plain or all(info.dtype == "F32" for info in checkpoint.tensors.values())
    )
    if exact:
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        path = Path(folder) / "reference-f32.gguf"
        write_artifact(checkpoint, uniform_plan(checkpoint, "F32", None), path)
        yield path


class RunnerPool:
    """Opens models when they are used; with ``keep``, and if all fit into half of the memory, only once.

    On the CPU quantized weights are decoded once if they fit, and otherwise stay packed; elsewhere they always do.
    """

    def __init__(self, runtime: str, window: int, checkpoints: list[Checkpoint], keep: bool, device: str = "cpu") -> None:
        self._runtime, self._window, self._device = runtime, window, device
        self._keep = keep and sum(self._bytes(checkpoint) for checkpoint in checkpoints) <= _memory_bytes(device) // 2
        self._open: dict[int, Runner] = {}

    def _bytes(self, checkpoint: Checkpoint) -> int:
        """What a loaded model takes at most."""
        plain = all(info.dtype in checkpoint.plain_types for info in checkpoint.tensors.values())
        packed = self._device != "cpu" and not plain
        return sum(path.stat().st_size for path in checkpoint.weight_files) if packed else 4 * checkpoint.n_weights

    def _start(self, checkpoint: Checkpoint) -> Runner:
        if self._runtime == "llama":
            return LlamaRunner(checkpoint, self._window)
        return TorchRunner(checkpoint, 4 * checkpoint.n_weights > _memory_bytes("cpu") // 2, self._device)

    def __enter__(self) -> RunnerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for runner in self._open.values():
            runner.close()

    @contextlib.contextmanager
    def use(self, checkpoint: Checkpoint) -> Iterator[Runner]:
        """The loaded model; it stays loaded if the pool keeps models."""
        runner = self._open.get(id(checkpoint)) or self._start(checkpoint)
        if self._keep:
            self._open[id(checkpoint)] = runner
        try:
            yield runner
        finally:
            if not self._keep:
                runner.close()


def _memory_bytes(device: str) -> int:
    """Physical memory of this machine, or what is free on a GPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
