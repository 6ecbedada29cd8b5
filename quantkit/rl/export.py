"""What was trained, for other programs: adapter.gguf for llama.cpp, or merged into a new quantized file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from quantkit.checkpoint.adapter import AdaptedCheckpoint, Adapter, Pair, write_adapter
from quantkit.checkpoint.files import read_json, refuse_existing
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.checkpoint.source import CheckpointView
from quantkit.errors import AdapterError
from quantkit.formats import get_format
from quantkit.modeling.skeleton import row_order, tensor_names
from quantkit.planning.plan import Assignment, Plan
from quantkit.quantizer.pipeline import run
from quantkit.rl.base import Base, require_bound

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FRONT = "base_model.model."  # PEFT's, of every name


@dataclass(frozen=True)
class Lora:
    """Pairs by GGUF tensor in llama.cpp's order of rows, unscaled; alpha ÷ rank is their factor."""

    pairs: dict[str, Pair]
    alpha: float
    rank: int


def read_lora(folder: Path, checkpoint: Checkpoint) -> Lora:
    """The adapter of a PEFT folder for a model: see ``lora_of``. Raises AdapterError."""
    if not (folder / WEIGHTS).exists() or not (folder / CONFIG).exists():
        raise AdapterError(f"{folder} has no {WEIGHTS} and {CONFIG}", hint="give the folder that training wrote")
    file = SafetensorsFile(folder / WEIGHTS)
    values = {name: file.read_rows(name, 0, math.prod(e.shape[:-1])).reshape(e.shape) for name, e in file.entries.items()}
    return lora_of(values, read_json(folder / CONFIG), checkpoint, str(folder))


def lora_of(values: dict[str, np.ndarray], config: dict[str, Any], checkpoint: Checkpoint, source: str) -> Lora:
    """An adapter from PEFT's weights by name and its configuration. A factor by the root of the rank (rsLoRA) goes into alpha.

    Raises AdapterError for what a GGUF adapter cannot hold: ranks that differ, biases, trained modules, DoRA.
    """
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias"):
        if config.get(name):
            raise AdapterError(f"{source} has {name}: {config[name]!r}", hint="an adapter.gguf holds pairs of one rank only")
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, value in values.items():
        stem, _, end = key.removeprefix(FRONT).rpartition(".lora_")
        half, _, part = end.removesuffix(".weight").partition("_")
        if half not in ("A", "B") or not stem:
            raise AdapterError(f"{source}: {key} is no half of a pair", hint="an adapter.gguf holds pairs only")
        name = _tensor(checkpoint, stem, part)
        halves.setdefault(name, {})[half] = _rows_as_in_the_file(checkpoint, name, value) if half == "B" else value
    pairs = {name: (found["A"], found["B"]) for name, found in halves.items() if len(found) == 2}
    if len(pairs) < len(halves):
        raise AdapterError(f"{source}: {next(iter(halves.keys() - pairs.keys()))} has only half of a pair", hint="train again")
    return Lora(pairs, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha, rank)


def _tensor(checkpoint: Checkpoint, module: str, part: str) -> str:
    """GGUF tensor of a module; part: of its experts."""
    if not part:
        return tensor_names(checkpoint, f"{module}.weight")[0]
    names = tensor_names(checkpoint, f"{module}.gate_up_proj") + tensor_names(checkpoint, f"{module}.down_proj")
    return names[("gate_proj", "up_proj", "down_proj").index(part)]


def _rows_as_in_the_file(checkpoint: Checkpoint, name: str, value: np.ndarray) -> np.ndarray:
    """The second half in llama.cpp's order of rows (q and k of Llama)."""
    if value.ndim == 3 or not checkpoint.family.permutes_qk:
        return value
    out = np.empty_like(value)
    out[row_order(checkpoint, name)] = value
    return out


def export_adapter(folder: Path, base: Base, out: Path, force: bool = False) -> Lora:
    """Write adapter.gguf (F32) for llama.cpp. Raises AdapterError if it belongs to another base, OutputError."""
    require_bound(folder, base)
    refuse_existing(out, force)
    lora = read_lora(folder, base.checkpoint)
    write_adapter(out, base.checkpoint.family.arch, lora.pairs, lora.alpha, "F32")
    return lora


class DecodedView(CheckpointView):
    """A quantized model as if its tensors were F32."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source)
        self.tensors = {
            name: info if info.dtype in source.plain_types else replace(info, dtype="F32")
            for name, info in source.tensors.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> Any:
        return self.source.read_rows(name, start, stop)


def merge(folder: Path, base: Base, out: Path, force: bool = False) -> Plan:
    """Write base plus adapter as a GGUF with the base's own types; tensors without a pair keep their very bytes.

    The sum is rounded once more, by ggml's method without activation statistics: `compare` shows what that costs.
    Raises AdapterError if the base is no GGUF or another one, OutputError.
    """
    require_bound(folder, base)
    source = require_gguf(base)
    lora = read_lora(folder, source)
    for name in lora.pairs:
        if get_format(source.info(name).dtype).needs_importance:
            raise AdapterError(
                f"{name} is {source.info(name).dtype}, which is not written without activation statistics",
                hint="ship adapter.gguf beside the base",
            )
    scaled = {name: (a, b * np.float32(lora.alpha / lora.rank)) for name, (a, b) in lora.pairs.items()}
    view = AdaptedCheckpoint(DecodedView(source), Adapter(folder / WEIGHTS, source.family.arch, scaled))
    return _write_changed(source, view, out, scaled, {}, f"merge of {folder.resolve().name}", "base plus adapter", force)


def write_healed(base: Base, bytes_of: Mapping[str, npt.NDArray[np.uint8]], out: Path, what: str) -> Plan:
    """Write the base with other bytes for some tensors, each uint8 (rows, bytes of a row) of its own type.

    Raises AdapterError if the base is no GGUF, OutputError.
    """
    source = require_gguf(base)
    return _write_changed(source, DecodedView(source), out, bytes_of, bytes_of, what, "learned again", force=True)


def require_gguf(base: Base) -> GgufCheckpoint:
    """The base's file. Raises AdapterError if it is a folder."""
    if not isinstance(base.checkpoint, GgufCheckpoint):
        raise AdapterError(f"{base.name} is no GGUF", hint="take the GGUF, or train an adapter and ship it beside the base")
    return base.checkpoint


def _write_changed(
    source: GgufCheckpoint, view: Checkpoint, out: Path, changed: Collection[str], bytes_of: Mapping[str, npt.NDArray[np.uint8]],
    what: str, reason: str, force: bool,
) -> Plan:  # fmt: skip
    """Write ``view`` in the types of ``source``. changed: tensors that are not its bytes; bytes_of: those that are not encoded anew."""
    tensors = {
        name: Assignment(info.dtype, "ggml", reason if name in changed else "as in the base")
        for name, info in source.tensors.items()
    }
    given = {
        name: source.read_packed(name, 0, info.rows)
        for name, info in source.tensors.items() if name not in changed and info.dtype not in source.plain_types
    }  # fmt: skip
    plan = Plan(what, "", view.identity, tensors, use_importance=False)
    run(view, plan, out, force=force, given={**given, **bytes_of})
    return plan


def merge_divergence(folder: Path, base: Base, merged: Path, tokens: int = 4096) -> tuple[float, float]:
    """What merging cost: mean KL divergence of the merged file from base plus adapter, nats/token, and its standard error.

    On the text that `quantkit compare` takes by default, run in torch. Changes ``base.model``: it gets the adapter.
    """
    import torch

    from quantkit.evaluation.compare import evaluation_windows
    from quantkit.evaluation.texts import default_texts
    from quantkit.metrics import kl_divergence
    from quantkit.modeling.packed import packed_model
    from quantkit.rl.plugin_peft import with_adapter

    window = min(512, int(base.checkpoint.config.get("max_position_embeddings") or 512))
    reference, candidate = with_adapter(base.model, str(folder)), packed_model(open_checkpoint(merged), device=base.model.device)
    found = []
    with torch.no_grad():
        for ids in evaluation_windows(base.checkpoint, default_texts(), window, tokens):
            given = torch.from_numpy(ids)[None].to(base.model.device)
            a, b = (model(given, use_cache=False).logits[0].float() for model in (reference, candidate))
            found.append(kl_divergence(torch.log_softmax(a, -1), b).cpu())
    values = torch.cat(found).double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
