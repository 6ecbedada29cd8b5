"""The original's distributions on a text, kept so small that a huge original is run once.

Of each scored position the file holds some hundred tokens with their log-probabilities: all that are likelier than a
threshold τ (the head), and a sample of the others (the tail), drawn with chances proportional to their probability p, which
therefore all stand for the same mass τ. Sampling that way: Madow, "On the Theory of Systematic Sampling, II" (1949). With
d = log q − log p and φ(d) = e^d − 1 − d ≥ 0, the KL divergence is exactly

    Σ_head p φ(d) + P φ(a) + Σ_tail p (e^(d−a) − 1 − (d − a)),    a = log Q − log P,

where P and Q are the masses of the tail: P is in the file, Q is known once the candidate has run. The first two terms are a
lower bound, only the last is estimated. As the sum of p (e^(d−a) − 1) over the tail is 0, it may be weighted by any β without
bias. β = 1 makes the error of the estimate as small as the square of what it estimates; for candidates far from the original
less is better, so β comes from the sample, one for all positions of a window (Cochran, "Sampling Techniques", 1977, 7.3).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.files import refuse_existing, require_folder, sync_folder
from quantkit.checkpoint.safetensors_reader import DTYPES, MAX_HEADER
from quantkit.checkpoint.safetensors_writer import StoredTensor
from quantkit.errors import CalibrationError, CheckpointError, OutputError
from quantkit.evaluation.breakdown import Estimate, Floats, Ids

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "quantkit-reference", 1
ENTRIES = 256  # tokens kept for each position
SEED = 8
BLOCK = 1 << 21  # numbers that are sampled from at a time
AGAIN = "delete it and make it again"
STRANGER = "give the model and the text that it was made with, or delete it"
SAID = {
    "identity": "the original", "stamp": "the files of the original", "tokenizer": "the tokenizer",
    "vocabulary": "the vocabulary", "window": "the window", "text": "the text", "runtime": "the runtime",
}  # fmt: skip
PARTS = ("ids", "logp", "head", "tail", "next_logp", "top1", "entropy")  # of one window, in the order of its checksum


@dataclass(frozen=True)
class StoredWindow:
    """A window out of the file. ids, logp: (n, entries), the head first, head: how many it has, tail: mass of all others."""

    ids: npt.NDArray[Any]
    logp: Floats
    head: npt.NDArray[np.uint16]
    tail: Floats
    next_logp: Floats
    top1: npt.NDArray[Any]
    entropy: Floats

    @property
    def top1_logp(self) -> Floats:
        """Log-probability of the most likely token."""
        return self.logp[:, 0]

    def divergence(self, logits: torch.Tensor, total: torch.Tensor | None = None) -> Estimate:
        """See :class:`KnownWindow`; the formula is in the module's text."""
        import torch

        ids, head = torch.from_numpy(self.ids.astype(np.int64)), torch.from_numpy(self.head.astype(np.int64))[:, None]
        logp, tail = torch.from_numpy(self.logp).double(), torch.from_numpy(self.tail).double()[:, None]
        in_head = torch.arange(ids.shape[1]) < head  # (n, entries)
        drawn = (ids.shape[1] - head).clamp_min(1)
        relative = logits - logits.amax(-1, keepdim=True)
        q = relative.exp()
        total = q.sum(-1, keepdim=True)
        q.scatter_(1, ids, q.gather(1, ids).masked_fill_(in_head, 0))
        left = (q.sum(-1, keepdim=True) / total).double()
        d = relative.gather(1, ids).double() - total.double().log() - logp
        a = left.clamp_min(1e-300).log() - tail.clamp_min(1e-300).log()
        lumped = torch.where(tail > 0, tail * (a.expm1() - a), left)
        known = (logp.exp() * (d.expm1() - d)).masked_fill(~in_head, 0).sum(-1) + lumped[:, 0]
        absent = in_head | (tail == 0)
        estimated, variance = _tail_terms((d - a).masked_fill(absent, 0), absent, (tail / drawn)[:, 0])
        return Estimate((known + estimated).clamp_min(0).float().numpy(), variance.float().numpy())


def _tail_terms(d: torch.Tensor, absent: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last term of the formula and its variance, (n,) each. d: (n, entries), 0 where absent; weight: (n,) of a draw."""
    growth = d.clamp_max(300).expm1()
    drawn = (~absent).sum(-1).clamp_min(1)
    mean = (d.sum(-1) / drawn)[:, None]
    inner = (d - mean).masked_fill(absent, 0)
    spread = (weight**2 * (growth**2).sum(-1)).sum()
    beta = ((weight**2 * (growth * inner).sum(-1)).sum() / spread).clamp(0, 1) if spread > 0 else 1.0
    terms = beta * growth - d
    center = (terms.sum(-1) / drawn)[:, None]
    squares = ((terms - center).masked_fill(absent, 0) ** 2).sum(-1)
    return weight * terms.sum(-1), weight**2 * squares * drawn / (drawn - 1).clamp_min(1)


@dataclass(frozen=True)
class ReferenceKey:
    """What a file belongs to. texts: (name, windows) of each; text, tokenizer: hashes of token ids and of tokens."""

    name: str
    identity: str
    stamp: str
    architecture: str
    file_bytes: int
    runtime: str
    tokenizer: str
    vocabulary: int
    window: int
    text: str
    texts: tuple[tuple[str, int], ...]

    @staticmethod
    def of(checkpoint: Checkpoint, windows: Ids, texts: list[tuple[str, int]], runtime: str) -> ReferenceKey:
        """Of an original that is run over ``windows``, int64 (n, window), ``texts`` naming where they come from.

        Raises CalibrationError if there is no window.
        """
        if not len(windows):
            raise CalibrationError("the text is shorter than one window", hint="give a longer text with --text")
        return ReferenceKey(
            checkpoint.path.resolve().name, checkpoint.identity, checkpoint.stamp, checkpoint.family.arch,
            sum(path.stat().st_size for path in checkpoint.weight_files), runtime, _digest(words_of(checkpoint)),
            int(checkpoint.config["vocab_size"]), windows.shape[1], hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
            tuple(texts),
        )  # fmt: skip

    @staticmethod
    def parse(metadata: dict[str, str]) -> ReferenceKey:
        """From the metadata of a file. Raises KeyError, TypeError or ValueError if it is none."""
        if metadata["format"] != FORMAT or int(metadata["version"]) != VERSION:
            raise ValueError("another format or version")
        said = json.loads(metadata["key"])
        return ReferenceKey(**{**said, "texts": tuple((str(name), int(count)) for name, count in said["texts"])})

    def require(self, other: ReferenceKey, file: str) -> None:
        """Raise CheckpointError if a file of this key does not belong to ``other``, naming what differs."""
        pairs = ((words, getattr(self, name), getattr(other, name)) for name, words in SAID.items())
        said = [f"{words} ({str(there)[:8]} there, {str(here)[:8]} here)" for words, there, here in pairs if there != here]
        if said:
            raise CheckpointError(f"{file} belongs to something else: different are {', '.join(said)}", hint=STRANGER)


def words_of(checkpoint: Checkpoint) -> list[str]:
    """The tokens of a model, as its tokenizer writes them."""
    return list(checkpoint.metadata()["tokenizer.ggml.tokens"].value)


def _digest(words: list[str]) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def compress(logits: torch.Tensor, following: Ids, window: int, entries: int = ENTRIES) -> dict[str, npt.NDArray[Any]]:
    """What the file keeps of one window. logits: float32 (n, vocabulary); window: its number, from which the draws follow.

    Raises CheckpointError if the logits are not numbers.
    """
    import torch

    starts = torch.from_numpy(np.random.default_rng((SEED, window)).random(len(logits)))
    rows = max(1, BLOCK // logits.shape[1])
    found = []
    for at in range(0, len(logits), rows):
        logp = logits[at : at + rows].double().log_softmax(-1)
        if logp.isnan().any():
            raise CheckpointError("the original gives logits that are not numbers", hint="its weights are damaged")
        chosen = torch.from_numpy(following[at : at + rows])[:, None]
        entropy = -(logp.exp() * logp.clamp_min(-1e30)).sum(-1)
        found.append((*_draw(logp, min(entries, logits.shape[1]), starts[at : at + rows]), logp.gather(1, chosen)[:, 0], entropy))
    names = {"ids": DTYPES[_id_type(logits.shape[1])][0], "logp": "<f4", "head": "<u2", "tail": "<f4", "next_logp": "<f4", "entropy": "<f4"}  # fmt: skip
    columns = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    kept = {name: column.astype(kind) for (name, kind), column in zip(names.items(), columns, strict=True)}
    return {**kept, "top1": logits.argmax(-1).numpy().astype("<i4")}


def _draw(logp: torch.Tensor, entries: int, starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(ids, their log-probabilities, size of the head, mass of the tail) of float64 log-probabilities (n, vocabulary)."""
    import torch

    p = logp.exp()
    top, best = p.topk(entries, -1)
    beyond = p.scatter(1, best, 0.0).sum(-1, keepdim=True)
    left = top.flip(-1).cumsum(-1).flip(-1) + beyond  # mass of all but the h likeliest, for h = 0, 1, …
    place = torch.arange(entries)
    fits = (top * (entries - place) <= left) & (place > 0)  # the h+1st is no likelier than τ = left ÷ (entries − h)
    head = torch.where(fits.any(-1), fits.int().argmax(-1), entries)[:, None]
    in_head = place < head
    p.scatter_(1, best, p.gather(1, best).masked_fill_(in_head, 0))
    sums = p.cumsum(-1)
    mass = sums[:, -1:].contiguous()
    at = (starts[:, None] + (place - head).clamp_min(0)) / (entries - head).clamp_min(1) * mass
    at = torch.minimum(at, torch.nextafter(mass, torch.zeros_like(mass)))
    drawn = torch.searchsorted(sums, at, right=True).clamp_max(logp.shape[1] - 1)
    ids = torch.where(in_head | (mass == 0), best, drawn)
    return ids, logp.gather(1, ids), head[:, 0], mass[:, 0]


def _id_type(vocabulary: int) -> str:
    return "U16" if vocabulary <= 1 << 16 else "U32"


def _layout(key: ReferenceKey, windows: int, entries: int, words: int) -> list[StoredTensor]:
    """The tensors of a file, in their order; of the first dimension all but ``words`` have one row for each window."""
    n = key.window - key.window // 2 - 1
    entries = min(entries, key.vocabulary)
    parts = [
        ("tokens", "I32", (windows, key.window)), ("crc", "U32", (windows,)), ("logp", "F32", (windows, n, entries)),
        ("tail", "F32", (windows, n)), ("next_logp", "F32", (windows, n)), ("entropy", "F32", (windows, n)),
        ("top1", "I32", (windows, n)), ("ids", _id_type(key.vocabulary), (windows, n, entries)),
        ("head", "U16", (windows, n)), ("words", "U8", (words,)),
    ]  # fmt: skip
    return sorted((StoredTensor(*part) for part in parts), key=lambda tensor: (-tensor.item_bytes, tensor.name))


class ReferenceWriter:
    """Writes a file window by window under a hidden name, and under its own when all are there.

    What a killed run left is taken up again: ``missing`` are the windows that ``add`` still has to be called for. Raises
    OutputError if the file exists or cannot be written, CheckpointError if what was left belongs to something else.
    """

    def __init__(self, path: Path, key: ReferenceKey, windows: Ids, words: list[str], *, entries: int = ENTRIES, replace: bool = False) -> None:  # fmt: skip
        refuse_existing(path, replace)
        require_folder(path)
        self.path, self._windows = path, windows
        self._part = path.with_name(f".{path.name}.part")
        text = np.frombuffer(json.dumps(words).encode(), np.uint8)
        layout = _layout(key, len(windows), entries, len(text))
        metadata = {"format": FORMAT, "version": str(VERSION), "entries": str(entries), "key": json.dumps(asdict(key))}
        header, self._offsets, size = _header(layout, metadata)
        self._rows = {tensor.name: tensor.nbytes // len(windows) for tensor in layout if tensor.name != "words"}
        self._entries = entries
        with _disk(path), contextlib.ExitStack() as undo:
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
            undo.callback(os.close, self._file)
            self._begin(key, header, size)
            self._put("words", 0, text)
            self._put("tokens", 0, windows.astype("<i4"))
            self.missing = [i for i in range(len(windows)) if not self._whole(i)]
            undo.pop_all()

    def _begin(self, key: ReferenceKey, header: bytes, size: int) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self.path} is being written by another process", hint="wait for it") from None
        if os.pread(self._file, len(header), 0) == header and os.fstat(self._file).st_size == size:
            return
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # of what cannot be read nothing is lost
            ReferenceKey.parse(read_metadata(self._part)).require(key, str(self._part))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, header, 0)
        os.posix_fallocate(self._file, 0, size)

    def _put(self, name: str, row: int, data: npt.NDArray[Any]) -> None:
        view, at = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data, self._offsets[name] + row * self._rows.get(name, 0)
        while view:
            done = os.pwrite(self._file, view, at)
            at, view = at + done, view[done:]

    def _whole(self, index: int) -> bool:
        """Whether a window is there, to the last bit."""
        said = int.from_bytes(os.pread(self._file, 4, self._offsets["crc"] + 4 * index), "little")
        data = (os.pread(self._file, self._rows[name], self._offsets[name] + index * self._rows[name]) for name in PARTS)
        return said != 0 and said == _checksum(data)

    def add(self, index: int, logits: torch.Tensor) -> None:
        """Keep one window. logits: the original's at the scored positions, float32 (n, vocabulary)."""
        found = compress(logits, self._windows[index, self._windows.shape[1] // 2 + 1 :], index, self._entries)
        with _disk(self.path):
            for name in PARTS:
                self._put(name, index, found[name])
            checksum = _checksum(found[name].tobytes() for name in PARTS)
            self._put("crc", index, np.array([checksum], "<u4"))
        self.missing.remove(index)

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                if self.missing:
                    raise ValueError(f"{len(self.missing)} windows were not written")
                with _disk(self.path):
                    os.fsync(self._file)
                    os.replace(self._part, self.path)
                    sync_folder(self.path.parent)
        finally:
            os.close(self._file)


def _checksum(parts: Iterator[bytes]) -> int:
    """CRC-32 of pieces one after the other; never 0, which stands for nothing written."""
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found or 1


def _header(layout: list[StoredTensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header, where each tensor begins in the file, and the size of the file."""
    entries: dict[str, object] = {"__metadata__": metadata}
    starts, at = {}, 0
    for tensor in layout:
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        starts[tensor.name], at = at, at + tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + start for name, start in starts.items()}, base + at


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="free space, then run again to go on") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file. Raises OSError or ValueError if it has none."""
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= MAX_HEADER:
            raise ValueError("no header")
        return dict(json.loads(handle.read(length))["__metadata__"])


def is_reference(path: Path) -> bool:
    """Whether a file is one of these, or was before it was damaged behind its header."""
    try:
        return path.is_file() and read_metadata(path).get("format") == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Reference:
    """A file that is read window by window. windows: token ids, int64 (n, window).

    Raises CheckpointError if it is missing, damaged or of another version.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="np")
            metadata = self._file.metadata() or {}
            self.key, self.entries = ReferenceKey.parse(metadata), int(metadata["entries"])
            self.windows: Ids = self._file.get_tensor("tokens").astype(np.int64)
            layout = _layout(self.key, len(self.windows), self.entries, self._shape("words")[0])
            if any(self._shape(tensor.name) != tensor.shape for tensor in layout):
                raise ValueError("its tensors do not fit its metadata")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path.name} is not a stored reference ({error})", hint=AGAIN) from None

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def __len__(self) -> int:
        return len(self.windows)

    def window(self, index: int) -> StoredWindow:
        """One window. Raises CheckpointError if its bytes have changed since they were written."""
        parts = {name: self._file.get_slice(name)[index] for name in PARTS}
        if _checksum(parts[name].tobytes() for name in PARTS) != int(self._file.get_slice("crc")[index : index + 1][0]):
            raise CheckpointError(f"{self.path.name} is damaged in window {index}", hint=AGAIN)
        return StoredWindow(**parts)

    @property
    def words(self) -> list[str]:
        """The original's tokens."""
        return [str(word) for word in json.loads(self._file.get_tensor("words").tobytes())]

    @property
    def share(self) -> float:
        """Bytes of the file ÷ bytes of the logits it stands for, in float32."""
        scored = len(self) * (self.key.window - self.key.window // 2 - 1)
        return self.path.stat().st_size / (4 * scored * self.key.vocabulary)
