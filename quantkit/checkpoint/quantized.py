"""A folder of quantized weights read as if they were plain ones.

Several stored tensors appear as one, whose type is the format's name, and are decoded when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.families import Family
from quantkit.checkpoint.quantization import Formats
from quantkit.checkpoint.safetensors_reader import DTYPES, Entry, SafetensorsFile
from quantkit.checkpoint.shapes import Shape, split_name
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.tensors import TensorFormat, TensorLayout
from quantkit.formats.tensors.minifloat import bfloat16_decode, bfloat16_encode
from quantkit.formats.tensors.parts import Parts

Stored = dict[str, tuple[SafetensorsFile, str]]  # suffix after the module's name → where the tensor lies
SCALE = "weight_scale"


@dataclass(frozen=True)
class _Quantized:
    """One weight: its format, its shape (rows, columns) and its stored tensors."""

    format: type[TensorFormat]
    shape: tuple[int, int]
    stored: Stored


class DecodedTensors:
    """All shards of a quantized folder as one file of plain weights; ``entries`` give what is stored for each."""

    def __init__(self, shards: list[SafetensorsFile], formats: Formats, family: Family, shapes: dict[str, Shape], source: str):
        self.path = shards[0].path
        self.entries: dict[str, Entry] = {}
        self._formats, self._family, self._shapes, self._source = formats, family, shapes, source
        self._quantized: dict[str, _Quantized] = {}
        self._plain: dict[str, SafetensorsFile] = {}
        self._last: tuple[str, npt.NDArray[np.float32]] | None = None  # the weight of which a part was read last
        for module, stored in self._modules(shards).items():
            self._add(module, stored)

    def _modules(self, shards: list[SafetensorsFile]) -> dict[str, Stored]:
        """Stored tensors by the module that they belong to; the longest name that the family knows wins."""
        modules: dict[str, Stored] = {}
        for shard in shards:
            for name in shard.entries:
                if name.endswith("rotary_emb.inv_freq"):  # computed, not learned
                    continue
                module, suffix = self._parted(name)
                if suffix in modules.setdefault(module, {}):
                    raise CheckpointError(
                        f"{shard.path.name}: tensor {name} occurs in two shards", hint="download the model again"
                    )
                modules[module][suffix] = (shard, name)
        return modules

    def _parted(self, name: str) -> tuple[str, str]:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:end])
            if self._family.to_gguf(f"{module}.weight") is not None:
                return module, ".".join(parts[end:])
        return name.rpartition(".")[0], parts[-1]

    def _add(self, module: str, stored: Stored) -> None:
        """Make entries of one module's tensors: plain ones as they are, the others as one weight."""
        plain = {suffix: place for suffix, place in stored.items() if _is_plain(suffix, place[0].entries[place[1]])}
        parts = {suffix: place for suffix, place in stored.items() if suffix not in plain}
        for shard, name in plain.values():
            if parts and self._no_bias(shard, name):
                continue
            self._plain[name], self.entries[name] = shard, shard.entries[name]
        if not parts:
            return
        weight = f"{module}.weight"
        shape = self._shape(weight, next(iter(parts.values()))[1])
        fmt = self._format(module, shape, {suffix: shard.entries[name] for suffix, (shard, name) in parts.items()})
        self._quantized[weight] = _Quantized(fmt, shape, parts)
        nbytes = sum(shard.entries[name].nbytes for shard, name in parts.values())
        self.entries[weight] = Entry(fmt.name, shape, 0, nbytes)

    def _no_bias(self, shard: SafetensorsFile, name: str) -> bool:
        """Whether a bias is zeros that the architecture has no place for: AutoGPTQ stored one for every layer."""
        target = self._family.to_gguf(name)
        if not name.endswith(".bias") or target is None or split_name(target[0])[1] in self._shapes:
            return False
        return not shard.read_rows(name, 0, 1).any()

    def _shape(self, weight: str, stored: str) -> tuple[int, int]:
        """Rows and columns by config.json."""
        target = self._family.to_gguf(weight)
        shape = self._shapes.get(split_name(target[0])[1]) if target else None
        if shape is None or len(shape) < 2:
            raise CheckpointError(
                f"{self._source}: tensor {stored} is not part of this architecture",
                hint="quantkit does not drop tensors silently; this variant is not supported",
            )
        return shape[-2], shape[-1]

    def _format(self, module: str, shape: tuple[int, int], entries: dict[str, Entry]) -> type[TensorFormat]:
        """The one of the folder's formats that has these tensors."""
        reasons = {fmt: _difference(fmt, shape, entries) for fmt in self._formats}
        for fmt, reason in reasons.items():
            if not reason:
                return fmt
        nearest = max(reasons, key=lambda fmt: len(entries.keys() & fmt.layout(shape).keys()) if fmt.fits(shape) else 0)
        raise CheckpointError(f"{self._source}: {module}: {reasons[nearest]}", hint="the folder is incomplete or of another kind")

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start…stop as float32 (rows, columns). For a part, the whole is decoded and kept for the next call."""
        if name in self._plain:
            return self._plain[name].read_rows(name, start, stop)
        if (start, stop) == (0, self._quantized[name].shape[0]):
            return self._decoded(name)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._decoded(name))
        return self._last[1][start:stop].copy()

    def _decoded(self, name: str) -> npt.NDArray[np.float32]:
        return self.parts(name).weight()

    def is_quantized(self, name: str) -> bool:
        """Whether an entry has codes and scales."""
        return name in self._quantized

    def parts(self, name: str) -> Parts:
        """Codes and scales of a quantized weight. Raises CheckpointError for damaged tensors."""
        weight = self._quantized[name]
        tensors = {suffix: shard.read_bits(stored) for suffix, (shard, stored) in weight.stored.items()}
        dtypes = {suffix: shard.entries[stored].dtype for suffix, (shard, stored) in weight.stored.items()}
        try:
            return _parts(weight.format, weight.shape, tensors, dtypes)
        except FormatError as error:
            raise CheckpointError(f"{self._source}: {name}: {error.what}", hint="the folder is damaged") from None


def _is_plain(suffix: str, entry: Entry) -> bool:
    """Whether a tensor stands for itself: a weight or bias in a float type."""
    return suffix in ("weight", "bias") and DTYPES[entry.dtype][1] is not None


def _difference(fmt: type[TensorFormat], shape: tuple[int, int], entries: dict[str, Entry]) -> str:
    """What keeps these stored tensors from being ``fmt``; empty if nothing does."""
    if not fmt.fits(shape):
        return f"{fmt.name} cannot hold a weight of shape {shape}"
    layout = fmt.layout(shape)
    for name, wanted in layout.items():
        found = entries.get(name)
        if found is None:
            return f"{fmt.name} needs the tensor {name!r}, there are {', '.join(sorted(entries))}"
        free = "quant_state" in name  # JSON of any length
        if not _same_type(name, found, wanted) or not (free or _squeezed(found.shape) == _squeezed(wanted.shape)):
            return f"{name} is {found.dtype} {found.shape}, {fmt.name} asks for {wanted.dtype} {wanted.shape}"
    extra = sorted(entries.keys() - layout.keys())
    return f"the tensor {extra[0]!r} is not part of {fmt.name}" if extra else ""


def _squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _same_type(name: str, found: Entry, wanted: TensorLayout) -> bool:
    """Whether the types agree; scales may be in any float type, and a shape in 32-bit integers."""
    floats = ("F32", "F16", "BF16")
    if name == "weight_shape":
        return found.dtype in ("I32", "I64")
    scale = name in (SCALE, "weight_scale_inv", "weight_global_scale")
    return found.dtype == wanted.dtype or (scale and found.dtype in floats and wanted.dtype in floats)


def _parts(fmt: type[TensorFormat], shape: tuple[int, int], tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> Parts:
    """Take tensors apart whose scales may be in another float type than quantkit writes."""
    factor = None
    for name, wanted in fmt.layout(shape).items():
        if "quant_state" in name:
            continue
        value = tensors[name].reshape(wanted.shape)
        if dtypes[name] != wanted.dtype:
            value = bfloat16_decode(value) if dtypes[name] == "BF16" else value
            if wanted.dtype == "BF16":  # read as scales of one, then multiplied by the true ones
                factor, value = value.astype(np.float32), bfloat16_encode(np.ones(wanted.shape, np.float32))
        tensors[name] = value.astype(wanted.numpy(), copy=False)
    out = fmt.parts(tensors, shape)
    if factor is None:
        return out
    return replace(out, scale=out.scale * factor.reshape(len(factor), -1), scale_type="F32")  # (1, 1), or (rows, groups)
