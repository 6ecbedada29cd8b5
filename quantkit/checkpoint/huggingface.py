"""A Hugging Face folder as a checkpoint: config.json, safetensors (sharded or not), tokenizer.

If config.json has a ``quantization_config``, the weights are decoded when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.families import family_of_hf, head_dim
from quantkit.checkpoint.files import read_json
from quantkit.checkpoint.quantization import read_formats
from quantkit.checkpoint.quantized import DecodedTensors
from quantkit.checkpoint.roles import layer_of
from quantkit.checkpoint.safetensors_reader import Entry, SafetensorsFile
from quantkit.checkpoint.shapes import check_config, expected_shapes
from quantkit.checkpoint.source import Checkpoint, TensorInfo
from quantkit.checkpoint.tokenizer import tokenizer_metadata
from quantkit.errors import CheckpointError
from quantkit.formats.tensors.parts import Parts

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(Protocol):
    """What holds tensors: a safetensors file, or a view of several."""

    path: Path
    entries: dict[str, Entry]

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start…stop of a tensor as float32."""


@dataclass(frozen=True)
class _Part:
    """Where one matrix lies; ``heads`` tells into how many heads its rows are to be permuted."""

    file: Source
    name: str
    heads: int | None = None


class HfCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer."""

    plain_types = (*Checkpoint.plain_types, "F64")

    def __init__(self, folder: Path, pre_tokenizer: str | None = None) -> None:
        self.path = folder
        self.config = self._read_config()
        names = self.config.get("architectures") or ["(none)"]
        self.family = family_of_hf(str(names[0]) if isinstance(names, list) else str(names))
        check_config(self.config, self.family, "config.json")
        self._pre_tokenizer = pre_tokenizer
        self.shards = self._shards()
        self._parts: dict[str, list[_Part]] = {}
        self._computed: dict[str, npt.NDArray[np.float32]] = {}
        self.tensors = {}
        self._map()
        self._check()

    @property
    def weight_files(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    def _read_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise CheckpointError(f"{self.path} has no config.json", hint="give a Hugging Face model folder or a GGUF file")
        config = read_json(file)
        if config.get("num_experts") is None and config.get("num_local_experts"):
            config["num_experts"] = config["num_local_experts"]
        self.quantization: dict[str, Any] = config.pop("quantization_config", None) or {}
        return config

    def _sources(self) -> Sequence[Source]:
        """What holds the model's tensors: the files, or a view that decodes them."""
        if not self.quantization:
            return self.shards
        source = self.path.resolve().name
        formats = read_formats(self.quantization, source)
        return [DecodedTensors(self.shards, formats, self.family, expected_shapes(self.config, self.family), source)]

    def _shards(self) -> list[SafetensorsFile]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CheckpointError(f"{index} has no weight_map", hint="download the file again") from None
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{index.name} names the file {name!r} outside the folder", hint="do not trust this model"
                    )
                if not (self.path / name).exists():
                    raise CheckpointError(f"shard {name} is missing", hint="download the missing shard")
            return [SafetensorsFile(self.path / name) for name in names]
        files = sorted(self.path.glob("model*.safetensors")) or sorted(self.path.glob("*.safetensors"))
        if not files:
            pickles = [f.name for f in self.path.iterdir() if f.suffix in PICKLES]
            if pickles:
                raise CheckpointError(
                    f"{self.path} has only pickled weights ({pickles[0]}), which can run code when loaded",
                    hint="download the safetensors version",
                )
            raise CheckpointError(f"{self.path} has no *.safetensors", hint="download the weights")
        return [SafetensorsFile(file) for file in files]

    def _map(self) -> None:
        found: dict[str, dict[int, _Part]] = {}
        config = self.config
        heads = {
            "attn_q": config.get("num_attention_heads"),
            "attn_k": config.get("num_key_value_heads") or config.get("num_attention_heads"),
        }
        unknown = []
        for shard in self._sources():
            for hf_name in shard.entries:
                target = self.family.to_gguf(hf_name)
                if target is None:
                    if not hf_name.endswith("rotary_emb.inv_freq"):
                        unknown.append(hf_name)
                    continue
                name, expert = target
                stem = name.split(".")[-2]
                permute = heads.get(stem) if self.family.permutes_qk else None
                if (expert or 0) in found.setdefault(name, {}):
                    raise CheckpointError(
                        f"{shard.path.name}: tensor {hf_name} occurs in two shards", hint="download the model again"
                    )
                found[name][expert or 0] = _Part(shard, hf_name, permute)
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} tensors are not part of {self.config['architectures'][0]}, first {unknown[0]}",
                hint="quantkit does not drop tensors silently; this variant is not supported",
            )
        if config.get("tie_word_embeddings"):
            found.pop("output.weight", None)
            if self.family.head_required:  # llama.cpp's loader has no tied head here: write a copy
                found["output.weight"] = found["token_embd.weight"]
        elif "output.weight" not in found:
            raise CheckpointError(
                f"{self.path.name} has no lm_head.weight and config.json does not tie it", hint="the checkpoint is incomplete"
            )
        for name in sorted(found, key=_file_order):
            self._add(name, [found[name][e] for e in sorted(found[name])], sorted(found[name]))
        if self.family.rope_freqs:
            factors = rope_factors(config)
            if factors is not None:
                self._computed["rope_freqs.weight"] = factors
                self.tensors["rope_freqs.weight"] = TensorInfo("rope_freqs.weight", factors.shape, "F32")

    def _add(self, name: str, parts: list[_Part], numbers: list[int]) -> None:
        first = parts[0].file.entries[parts[0].name]
        for part in parts:
            entry = part.file.entries[part.name]
            if entry.shape != first.shape:
                raise CheckpointError(
                    f"{part.name} is {list(entry.shape)}, its neighbours are {list(first.shape)}",
                    hint="the checkpoint is damaged",
                )
        shape = first.shape
        if name.endswith("_exps.weight"):
            wanted = self.config["num_experts"]
            if numbers != list(range(wanted)):
                raise CheckpointError(
                    f"{name}: experts {numbers} found, config.json says {wanted}", hint="the checkpoint is incomplete"
                )
            shape = (len(parts), *shape)
        if name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 2:
            shape = (shape[-1],)
        self._parts[name] = parts
        self.tensors[name] = TensorInfo(name, shape, first.dtype)

    def nbytes(self, name: str) -> int:
        parts = self._parts.get(name)
        return sum(part.file.entries[part.name].nbytes for part in parts) if parts else self._computed[name].nbytes

    def quantized_parts(self, name: str) -> Iterator[Parts] | None:
        """Codes and scales of a tensor (of each of its experts, read one by one) in the folder's own order of rows.

        None for tensors that are not quantized. Raises CheckpointError for damaged ones.
        """
        pieces = self._parts.get(name, [])
        files = [part.file for part in pieces]
        if not pieces or not all(
            isinstance(file, DecodedTensors) and file.is_quantized(part.name) for file, part in zip(files, pieces, strict=True)
        ):
            return None
        return (part.file.parts(part.name) for part in pieces)  # type: ignore[attr-defined]

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        if name in self._computed:
            return self._computed[name].reshape(1, -1)
        info, parts = self.info(name), self._parts[name]
        if len(info.shape) == 1:
            part = parts[0]
            values = part.file.read_rows(part.name, 0, 1).reshape(-1)
            order = _permutation(info.size, part.heads) if part.heads else slice(None)
            return values[order].reshape(1, -1)
        per_part = info.rows // len(parts)
        pieces = []
        while start < stop:
            index, row = divmod(start, per_part)
            count = min(stop - start, per_part - row)
            pieces.append(_read_part(parts[index], row, row + count, per_part))
            start += count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def metadata(self) -> gv.Metadata:
        return dict(self._cached_metadata)

    @cached_property
    def _cached_metadata(self) -> gv.Metadata:
        out: gv.Metadata = {
            "general.architecture": gv.string(self.family.arch),
            "general.type": gv.string("model"),
            "general.name": gv.string(self.path.resolve().name),
        }
        out.update(self.family.metadata(self.config))
        out.update(tokenizer_metadata(self.path, self.config, self._pre_tokenizer))
        return out


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """Divisors of the rope angles for ``rope_type: llama3``, float32 (head_dim / 2,), else None.

    Formula: Llama 3.1's rope scaling, transformers/modeling_rope_utils.py, _compute_llama3_parameters.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    size = head_dim(config)
    factor, low, high = rope.get("factor", 8.0), rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    wavelength = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = (context / wavelength - low) / (high - low)
    mixed = 1 / ((1 - smooth) / factor + smooth)
    out = np.where(wavelength < context / high, 1.0, np.where(wavelength > context / low, factor, mixed))
    return out.astype(np.float32)


def _file_order(name: str) -> tuple[int, int, str]:
    """Embedding, output norm and head first, then the layers in order."""
    layer = layer_of(name)
    return (0, 0, name) if layer is None else (1, layer, name)


def _permutation(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Source row of each row: halves of a head become pairs of neighbours (llama.cpp's rope order)."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _read_part(part: _Part, start: int, stop: int, rows: int) -> npt.NDArray[np.float32]:
    if part.heads is None:
        return part.file.read_rows(part.name, start, stop)
    order = _permutation(rows, part.heads)[start:stop]
    first = int(order.min())
    return part.file.read_rows(part.name, first, int(order.max()) + 1)[order - first]
