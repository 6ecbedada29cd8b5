"""The base that an adapter is trained on: its model with packed weights, its tokenizer, and hashes of every byte."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.checkpoint.files import read_json, write_text
from quantkit.errors import AdapterError
from quantkit.modeling.packed import packed_model
from quantkit.modeling.text import transformers_tokenizer
from quantkit.versions import package_versions

BINDING = "quantkit_base.json"
VERSION = 1


@dataclass
class Base:
    """model: transformers' class, quantized tensors packed.

    digest: SHA-256 of the files with the weights, to which adapters are bound; the same on every device. held: of the
    weights in memory when they were loaded, see ``digest_of``.
    """

    checkpoint: Checkpoint
    model: Any
    tokenizer: Any
    digest: str
    held: str

    @property
    def name(self) -> str:
        """Name of the file or folder."""
        return self.checkpoint.path.resolve().name


def open_base(path: str | Path, dtype: Any = None, device: str = "cpu") -> Base:
    """A GGUF or folder, quantized or not, ready to be trained on. dtype: of activations and what is not packed."""
    checkpoint = open_checkpoint(path)
    model = packed_model(checkpoint, dtype, device)
    return Base(checkpoint, model, transformers_tokenizer(checkpoint), digest_of_files(checkpoint), digest_of(model))


def digest_of_files(checkpoint: Checkpoint) -> str:
    """SHA-256 over the bytes of the files with a model's weights, in their order."""
    total = hashlib.sha256()
    for path in checkpoint.weight_files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def without_adapter(model: Any) -> Any:
    """transformers' model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def digest_of(model: Any) -> str:
    """SHA-256 over the name, type, shape and bytes of every weight of the base in memory, adapters left out.

    Packed weights count as they lie in the file, whatever order their device has; the names are those without PEFT.
    """
    import torch

    total = hashlib.sha256()
    for name, value in sorted(without_adapter(model).state_dict().items()):
        if "lora_" in name:
            continue
        plain = value.detach().cpu().contiguous()
        total.update(f"{name.replace('.base_layer.', '.')} {plain.dtype} {tuple(plain.shape)}\n".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def require_unchanged(base: Base, model: Any) -> None:
    """Raise AdapterError if training changed the base."""
    if digest_of(model) != base.held:
        raise AdapterError(
            f"training changed the weights of {base.name}", hint="nothing was saved; report the model and the options"
        )


def bind(folder: Path, base: Base) -> None:
    """Write into an adapter's folder which base it belongs to."""
    said = {"quantkit_adapter": VERSION, "base": base.name, "digest": base.digest, "versions": package_versions("torch", "peft")}
    write_text(folder / BINDING, json.dumps(said, indent=1) + "\n")


def require_bound(folder: Path, base: Base) -> None:
    """Raise AdapterError for an adapter that was trained on another base, naming both."""
    file = folder / BINDING
    if not file.exists():
        raise AdapterError(f"{folder} has no {BINDING}", hint="give a folder that `quantkit rl` wrote")
    said = read_json(file)
    if said.get("quantkit_adapter") != VERSION:
        raise AdapterError(f"{file} is of another version ({said.get('quantkit_adapter')})", hint="train the adapter again")
    if said.get("digest") != base.digest:
        raise AdapterError(
            f"{folder} was trained on {said.get('base')} ({str(said.get('digest'))[:12]}…), not on {base.name} ({base.digest[:12]}…)",
            hint="give the very file it was trained on",
        )
