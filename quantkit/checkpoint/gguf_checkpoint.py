"""A GGUF file as a checkpoint; split files are opened together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint.families import family_of_gguf
from quantkit.checkpoint.gguf_reader import GgufFile, type_name
from quantkit.checkpoint.shapes import check_config
from quantkit.checkpoint.source import Checkpoint, TensorInfo
from quantkit.errors import CheckpointError


class GgufCheckpoint(Checkpoint):
    """A GGUF file; the parts of a split one are opened together."""

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

    def nbytes(self, name: str) -> int:
        return self._file_of[name].entries[name].nbytes

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        self.info(name)
        return self._file_of[name].read_rows(name, start, stop)

    def read_packed(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start…stop as they lie in the file: uint8 (rows, bytes of a row)."""
        self.info(name)
        return self._file_of[name].read_packed(name, start, stop)

    def metadata(self) -> gv.Metadata:
        dropped = ("split.", "quantkit.", "general.alignment")  # our files are aligned to the default
        return {key: value for key, value in self._metadata.items() if not key.startswith(dropped)}


def split_files(path: Path) -> list[Path]:
    """All parts of a file split with llama.cpp's naming, or the file alone."""
    match = re.match(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$", path.name)
    if not match:
        return [path]
    total = int(match.group(3))
    parts = [path.with_name(f"{match.group(1)}-{i:05d}-of-{total:05d}.gguf") for i in range(1, total + 1)]
    for part in parts:
        if not part.exists():
            raise CheckpointError(f"part {part.name} of the split file is missing", hint="put all parts into one folder")
    return parts
