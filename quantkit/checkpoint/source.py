"""A model on disk whose tensors are read piece by piece, under their GGUF names.

Two kinds, one interface: a Hugging Face folder (safetensors) and a GGUF file in F32, F16 or BF16. Row
order and stacking are llama.cpp's in both, so everything downstream sees one layout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.families import Family, family_of_gguf, family_of_hf, head_dim
from quantkit.checkpoint.files import read_json
from quantkit.checkpoint.gguf_reader import GgufFile, type_name
from quantkit.checkpoint.roles import Role, is_quantizable, layer_of, role_of
from quantkit.checkpoint.safetensors_reader import SafetensorsFile
from quantkit.checkpoint.shapes import check_config, check_shapes
from quantkit.checkpoint.tokenizer import tokenizer_metadata
from quantkit.errors import CheckpointError
from quantkit.formats import formats

SAMPLED_ROWS = 8
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor under its GGUF name; shape as NumPy orders it, experts stacked in front."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def role(self) -> Role:
        """What the tensor does."""
        return role_of(self.name)

    @property
    def layer(self) -> int | None:
        """Its layer, None outside the layers."""
        return layer_of(self.name)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows over all experts."""
        return self.size // self.columns

    @property
    def experts(self) -> int:
        """Stacked experts, 1 for an ordinary matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def quantizable(self) -> bool:
        """Whether llama.cpp would quantize it."""
        return is_quantizable(self.name, self.shape)


class Checkpoint:
    """Base of both kinds; ``tensors`` is in file order."""

    path: Path
    family: Family
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start…stop of a tensor (rows of all experts in sequence) as float32 (rows, columns)."""
        raise NotImplementedError

    def metadata(self) -> gv.Metadata:
        """GGUF metadata of the unquantized model, tokenizer included."""
        raise NotImplementedError

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor as float32 in its own shape."""
        info = self.info(name)
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def slices(self, name: str, max_weights: int) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
        """(expert, first row within the expert, float32 rows) that together cover a tensor in order."""
        info = self.info(name)
        per_expert = info.rows // info.experts
        step = max(1, max_weights // info.columns)
        for expert in range(info.experts):
            for row in range(0, per_expert, step):
                stop = min(row + step, per_expert)
                yield expert, row, self.read_rows(name, expert * per_expert + row, expert * per_expert + stop)

    def info(self, name: str) -> TensorInfo:
        """Facts about one tensor. Raises CheckpointError with near names if it is missing."""
        if name not in self.tensors:
            import difflib

            near = ", ".join(difflib.get_close_matches(name, self.tensors, n=3)) or "none alike"
            raise CheckpointError(f"{self.path.name} has no tensor {name!r}", hint=f"nearest names: {near}")
        return self.tensors[name]

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weights."""
        return "output.weight" not in self.tensors

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def n_weights(self) -> int:
        """Weights over all tensors."""
        return sum(t.size for t in self.tensors.values())

    @cached_property
    def identity(self) -> str:
        """A hash that tells models apart: architecture, shapes and a sample of every tensor's rows."""
        digest = hashlib.sha256(self.family.arch.encode())
        for key, value in sorted(self.family.metadata(self.config).items()):
            digest.update(key.encode() + value.packed())
        for info in sorted(self.tensors.values(), key=lambda t: t.name):
            digest.update(f"{info.name}{info.shape}".encode())
            for row in np.unique(np.linspace(0, info.rows - 1, SAMPLED_ROWS).astype(int)):
                digest.update(self.read_rows(info.name, int(row), int(row) + 1).tobytes())
        return digest.hexdigest()[:16]

    @property
    def stamp(self) -> str:
        """Sizes and times of the files: changes whenever a weight is edited. Guards everything cached."""
        stats = [path.stat() for path in self.weight_files]
        return hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in stats]).encode()).hexdigest()[:16]

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        raise NotImplementedError

    def _check(self) -> None:
        """Refuse what contradicts the config, before anything is read."""
        shapes = {info.name: info.shape for info in self.tensors.values()}
        check_shapes(shapes, self.config, self.family, self.path.resolve().name)


def require_readable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a tensor has a type that quantkit cannot decode."""
    known = {fmt.name for fmt in formats()} | {"F64"}
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


@dataclass(frozen=True)
class _Part:
    """Where one matrix lies; ``heads`` tells into how many heads its rows are to be permuted."""

    file: SafetensorsFile
    name: str
    heads: int | None = None


class HfCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json, safetensors (sharded or not), tokenizer."""

    def __init__(self, folder: Path, pre_tokenizer: str | None = None) -> None:
        self.path = folder
        self.config = self._read_config()
        names = self.config.get("architectures") or ["(none)"]
        self.family = family_of_hf(str(names[0]) if isinstance(names, list) else str(names))
        check_config(self.config, self.family, "config.json")
        self._pre_tokenizer = pre_tokenizer
        self._parts: dict[str, list[_Part]] = {}
        self._computed: dict[str, npt.NDArray[np.float32]] = {}
        self.tensors = {}
        self._map()
        self._check()

    @property
    def weight_files(self) -> list[Path]:
        return sorted({part.file.path for parts in self._parts.values() for part in parts})

    def _read_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise CheckpointError(f"{self.path} has no config.json", hint="give a Hugging Face model folder or a GGUF file")
        config = read_json(file)
        if config.get("num_experts") is None and config.get("num_local_experts"):
            config["num_experts"] = config["num_local_experts"]
        return config

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
        for shard in self._shards():
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


class GgufCheckpoint(Checkpoint):
    """A GGUF file whose weights are not quantized (BF16, F16, F32); split files are opened together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [GgufFile(p) for p in split_files(path)]
        self._metadata = self.files[0].metadata
        values = gv.plain(self._metadata)
        if "general.architecture" not in values:
            raise CheckpointError(
                f"{path.name} has no general.architecture", hint="the file is not a model (an imatrix or adapter?)"
            )
        if values.get("general.type", "model") != "model":
            raise CheckpointError(
                f"{path.name} is of type {values['general.type']!r}, not a model", hint="give the model's own GGUF"
            )
        self.family = family_of_gguf(values["general.architecture"])
        self.config = self.family.config(values)
        check_config(self.config, self.family, path.name)
        self._require_tokenizer(values)
        self._file_of = {name: file for file in self.files for name in file.entries}
        self.tensors = {
            name: TensorInfo(name, entry.shape, entry.format.name if entry.format else type_name(entry.gguf_id))
            for file in self.files
            for name, entry in file.entries.items()
        }
        self.config["tie_word_embeddings"] = self.tied
        biased = "blk.0.attn_q.bias" in self.tensors  # GGUF has no key for biases: the tensors tell
        self.config.update(attention_bias=biased, qkv_bias=biased, mlp_bias="blk.0.ffn_down.bias" in self.tensors)
        self._check()

    def _require_tokenizer(self, values: dict[str, Any]) -> None:
        needed = ["tokenizer.ggml.model", "tokenizer.ggml.tokens"]
        needed += ["tokenizer.ggml.merges"] if values.get("tokenizer.ggml.model") == "gpt2" else []
        for key in needed:
            if key not in values:
                raise CheckpointError(f"{self.path.name} has no {key}", hint="convert the model again, with its tokenizer")

    @property
    def weight_files(self) -> list[Path]:
        return [file.path for file in self.files]

    def require_unquantized(self) -> None:
        """Raise CheckpointError if a tensor is quantized already: quantizing twice loses twice."""
        for info in self.tensors.values():
            if info.dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(
                    f"{self.path.name} is quantized already ({info.name} is {info.dtype})",
                    hint="start from the BF16, F16 or F32 file",
                )

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        self.info(name)
        return self._file_of[name].read_rows(name, start, stop)

    def metadata(self) -> gv.Metadata:
        dropped = ("split.", "quantkit.", "general.alignment")  # our files are aligned to the default
        return {key: value for key, value in self._metadata.items() if not key.startswith(dropped)}


def split_files(path: Path) -> list[Path]:
    """All parts of a file split with llama.cpp's naming, or the file alone."""
    import re

    match = re.match(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$", path.name)
    if not match:
        return [path]
    total = int(match.group(3))
    parts = [path.with_name(f"{match.group(1)}-{i:05d}-of-{total:05d}.gguf") for i in range(1, total + 1)]
    for part in parts:
        if not part.exists():
            raise CheckpointError(f"part {part.name} of the split file is missing", hint="put all parts into one folder")
    return parts
