"""Second moments of every linear map's inputs E[x xᵀ], and of the gradients at its outputs E[g gᵀ], on disk.

A matrix for each distinct input of a layer (q, k and v share one), written as soon as the layer is done. Wide
inputs keep diagonal blocks of at most WIDEST columns; experts keep one matrix each while a tensor's matrices stay
under TENSOR_BYTES, else one for all of them. Outputs keep diagonal blocks of at most TALLEST rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.files import write_text
from quantkit.encoders.stats import Moments

if TYPE_CHECKING:
    import torch

INDEX, OUTPUTS = "index.json", "outputs.json"
WIDEST, TALLEST = 4096, 1024
TENSOR_BYTES = 1 << 28
TOGETHER = 1 << 22  # weights that are encoded together at most


def same_input(kept: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether x is the tensor that was kept, or another view of the same memory: q, k and v share one input."""
    return kept.data_ptr() == x.data_ptr() and kept.shape == x.shape


def column_blocks(columns: int, widest: int = WIDEST) -> int:
    """Diagonal blocks that are kept of a (columns, columns) matrix: as few as have at most ``widest`` columns each."""
    count = -(-columns // widest)
    while columns % count or ((columns // count) % 256 and columns % 256 == 0):
        count += 1
    return count


def row_limit(columns: int) -> int:
    """Rows whose outputs are kept together at most: they are encoded together, so their weights must fit in memory."""
    return min(TALLEST, max(256, TOGETHER // columns))


class MomentWriter:
    """Adds up x xᵀ while calibration shows inputs; ``flush`` after each layer, ``close`` at the end."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, key: str, half: bool = False) -> None:
        """half: multiply in BF16."""
        self._folder, self._checkpoint, self._key, self._half = folder, checkpoint, key, half
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._index: dict[str, dict[str, Any]] = {}
        self._last: tuple[torch.Tensor, str] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)

    def add(self, name: str, expert: int, x: torch.Tensor) -> None:
        """Inputs (tokens, columns) of one expert of a tensor."""
        import torch

        from quantkit.modeling.products import gram

        if self._last is not None and same_input(self._last[0], x):
            self._index[name] = self._index[self._last[1]]
            return
        info = self._checkpoint.info(name)
        count = column_blocks(info.columns)
        width = info.columns // count
        apart = info.experts if info.experts * count * width * width * 4 <= TENSOR_BYTES else 1
        if name not in self._sums:
            self._sums[name] = torch.zeros(apart, count, width, width)
            self._counts[name] = np.zeros(apart, np.int64)
            self._index[name] = {"file": f"{name}.npy", "experts": apart}
        place = expert if apart > 1 else 0
        for block in range(count):
            self._sums[name][place, block] += gram(x[:, block * width : (block + 1) * width], self._half)
        self._counts[name][place] += len(x)
        self._last = (x, name)

    def flush(self) -> None:
        """Write the matrices of the layer that is done."""
        for name, sums in self._sums.items():
            counts = self._counts[name]
            mean = sums.numpy() / np.maximum(counts, 1).astype(np.float32).reshape(-1, 1, 1, 1)
            np.save(self._folder / f"{name}.npy", mean)
            self._index[name]["counts"] = counts.tolist()
        self._sums.clear()
        self._last = None

    def close(self) -> MomentStore:
        """Write the index: only now can the matrices be found."""
        self.flush()
        write_text(self._folder / INDEX, json.dumps({"key": self._key, "tensors": self._index}))
        return MomentStore(self._folder, self._key, self._index)


class OutputWriter:
    """Adds up g gᵀ while a backward pass shows the gradients at outputs; ``flush`` after each layer, ``close`` at the end."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, tokens: int, half: bool = False) -> None:
        """tokens: of the whole pass. Sums are divided by it, so that an expert counts by its traffic. half: multiply in BF16."""
        self._folder, self._checkpoint, self._tokens, self._half = folder, checkpoint, tokens, half
        self._sums: dict[str, torch.Tensor] = {}
        self._index: dict[str, dict[str, Any]] = {}
        (folder / OUTPUTS).unlink(missing_ok=True)

    def add(self, name: str, expert: int, gradient: torch.Tensor) -> None:
        """Gradients (tokens, rows) at the outputs of one expert of a tensor."""
        import torch

        from quantkit.modeling.products import gram

        info = self._checkpoint.info(name)
        rows = info.rows // info.experts
        count = column_blocks(rows, row_limit(info.columns))
        height = rows // count
        if info.experts * rows * height * 4 > TENSOR_BYTES:  # rows then count as independent
            return
        if name not in self._sums:
            self._sums[name] = torch.zeros(info.experts, count, height, height)
            self._index[name] = {"file": f"{name}.outputs.npy", "rows": height}
        for block in range(count):
            self._sums[name][expert, block] += gram(gradient[:, block * height : (block + 1) * height], self._half)

    def flush(self) -> None:
        """Write the matrices of the layer that is done."""
        for name, sums in self._sums.items():
            np.save(self._folder / self._index[name]["file"], sums.numpy() / np.float32(self._tokens))
        self._sums.clear()

    def close(self) -> None:
        """Write the index: only now can the matrices be found."""
        self.flush()
        write_text(self._folder / OUTPUTS, json.dumps(self._index))


class MomentStore:
    """The matrices of one calibration, read when an encoder asks."""

    def __init__(self, folder: Path, key: str, tensors: dict[str, dict[str, Any]]) -> None:
        self.key = key
        self._folder, self._tensors = folder, tensors
        try:
            self._outputs: dict[str, dict[str, Any]] = json.loads((folder / OUTPUTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._outputs = {}

    @staticmethod
    def open(folder: Path) -> MomentStore | None:
        """The store in a folder, or None if there is none that is complete."""
        try:
            data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return MomentStore(folder, data["key"], data["tensors"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def get(self, name: str, expert: int = 0) -> Moments | None:
        """Moments of one expert's inputs; None where nothing is known."""
        entry = self._tensors.get(name)
        if entry is None or not (self._folder / entry["file"]).exists():
            return None
        place = expert if entry["experts"] > 1 else 0
        if not entry["counts"][place]:
            return None
        path = self._folder / entry["file"]
        return Moments(f"{self.key} {path} {place}", lambda: np.load(path, mmap_mode="r")[place])

    def output_rows(self, name: str) -> int:
        """Rows of an expert that are tied together by the outputs' moments; 0 where those are not known."""
        return int(self._outputs[name]["rows"]) if name in self._outputs else 0

    def outputs(self, name: str, expert: int, start: int, stop: int) -> Moments | None:
        """Moments of the gradients at rows start … stop of one expert, whole blocks of ``output_rows``."""
        entry = self._outputs.get(name)
        if entry is None or not (self._folder / entry["file"]).exists():
            return None
        path, height = self._folder / entry["file"], entry["rows"]
        blocks = slice(start // height, -(-stop // height))
        return Moments(f"{self.key} {path} {expert} {blocks}", lambda: np.load(path, mmap_mode="r")[expert, blocks])
