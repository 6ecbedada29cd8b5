"""Opens whatever a user points at."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint.gguf_checkpoint import GgufCheckpoint
from quantkit.checkpoint.huggingface import PICKLES, HfCheckpoint
from quantkit.checkpoint.source import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.formats import formats
from quantkit.formats.tensors import tensor_formats


def require_readable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a tensor has a type that quantkit cannot decode."""
    known = set(checkpoint.plain_types)
    opened = checkpoint.opened
    if isinstance(opened, GgufCheckpoint):
        known |= {fmt.name for fmt in formats()}
    elif isinstance(opened, HfCheckpoint) and opened.quantization:
        known |= {fmt.name for fmt in tensor_formats()}
    for info in checkpoint.tensors.values():
        if info.dtype not in known:
            raise CheckpointError(
                f"{checkpoint.path.name}: {info.name} has type {info.dtype}, which quantkit cannot read yet",
                hint="`quantkit formats` lists what it reads",
            )


def open_checkpoint(path: str | Path, *, pre_tokenizer: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file.

    pre_tokenizer: llama.cpp's name for the pre-tokenizer where tokenizer.json's is unknown.
    Raises CheckpointError if the path is missing, damaged, of an unknown architecture or pickled.
    """
    path = Path(path)
    if path == Path():
        path = path.resolve()
    if path.is_dir():
        return HfCheckpoint(path, pre_tokenizer)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", hint="give a Hugging Face folder or a GGUF file")
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path.name} is a pickle, which can run code when loaded", hint="quantkit reads safetensors and GGUF only"
        )
    if path.suffix == ".safetensors":
        return HfCheckpoint(path.parent, pre_tokenizer)
    return GgufCheckpoint(path)
