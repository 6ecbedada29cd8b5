"""Files of llama.cpp's ``llama-perplexity --kl-divergence-base``: read, written, and judged as ``--kl-divergence`` does.

Layout (llama.cpp, tools/perplexity/perplexity.cpp; little endian): "_logits_", then as int32 the tokens of a chunk n, the
vocabulary, the number of chunks and the token ids of all chunks; then for each chunk n − n ÷ 2 − 1 rows, those of the second
half: scale and lowest log-probability as float32, and a 16-bit number for each token, log p = scale · number + lowest. Logits
more than 16 below the largest count as 16 below. The token ids are those of the text; where the model wants a
beginning-of-text token, it takes the place of the first of every chunk when the chunk is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.files import PositionedFile, atomic_file, refuse_existing
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.evaluation.breakdown import Estimate, Floats, Ids
from quantkit.metrics import TokenScores, summarize

if TYPE_CHECKING:
    import torch

MAGIC = b"_logits_"
HEADER = len(MAGIC) + 12
FLOOR = -16.0  # log-probabilities that count
AGAIN = "make it again with llama-perplexity --kl-divergence-base"


def is_llama_reference(path: Path) -> bool:
    """Whether a file begins like one of these."""
    try:
        with open(path, "rb") as handle:
            return handle.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _row_numbers(vocabulary: int) -> int:
    """16-bit numbers of one row: two float32, then one for each token, an even number."""
    return 4 + 2 * ((vocabulary + 1) // 2)


@dataclass(frozen=True)
class LlamaWindow:
    """One chunk as llama.cpp keeps it. logp: float32 (n, vocabulary), not normalized, with its rounding and its floor."""

    logp: Floats
    following: Ids

    @property
    def next_logp(self) -> Floats:
        """Log-probability of the token that follows in the text."""
        return np.take_along_axis(self.logp, self.following[:, None], 1)[:, 0]

    @property
    def top1(self) -> Ids:
        """The most likely token, the first of equals."""
        return self.logp.argmax(-1)

    @property
    def top1_logp(self) -> Floats:
        """Log-probability of the most likely token."""
        return self.logp.max(-1)

    @property
    def entropy(self) -> Floats:
        """Of each distribution, nats."""
        return -(np.exp(self.logp) * self.logp).sum(-1)

    def divergence(self, logits: torch.Tensor, total: torch.Tensor | None = None) -> Estimate:
        """As llama.cpp sums it: over the tokens with log p > −16, without making up for those left out.

        Variances are 0. A divergence near 0 can be below it, as it can there.
        """
        import torch

        p = torch.from_numpy(self.logp)
        counted = p > FLOOR
        terms = p.exp().double().mul_((p - logits.log_softmax(-1)).double()).masked_fill_(~counted, 0)
        kld = terms.sum(-1).float().numpy()
        return Estimate(kld, np.zeros_like(kld))


class LlamaReference:
    """A file that is read chunk by chunk. Raises CheckpointError if it is missing, cut short or something else."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, PositionedFile(path)
        if self._file.size < HEADER or bytes(self._file.read(0, len(MAGIC))) != MAGIC:
            raise CheckpointError(f"{path.name} does not hold llama.cpp's log-probabilities", hint=AGAIN)
        self.window, self.vocabulary, chunks = np.frombuffer(self._file.read(len(MAGIC), 12), "<i4").tolist()
        if self.window < 4 or self.vocabulary < 1 or chunks < 1:
            raise CheckpointError(
                f"{path.name} says {chunks} chunks of {self.window} tokens, vocabulary {self.vocabulary}", hint=AGAIN
            )
        self._rows = self.window - self.window // 2 - 1
        self._chunk_bytes = 2 * self._rows * _row_numbers(self.vocabulary)
        self._data = HEADER + 4 * self.window * chunks
        whole = max(0, self._file.size - self._data) // self._chunk_bytes
        if self._file.size != self._data + chunks * self._chunk_bytes:
            what = f"holds {whole} of {chunks} chunks" if whole < chunks else "is longer than its chunks"
            raise CheckpointError(f"{path.name} {what}", hint=AGAIN)
        tokens = np.frombuffer(self._file.read(HEADER, 4 * self.window * chunks), "<i4").reshape(chunks, self.window)
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise CheckpointError(f"{path.name} has token ids outside its vocabulary of {self.vocabulary}", hint=AGAIN)
        self.tokens: Ids = tokens.astype(np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def require_vocabulary(self, size: int, name: str) -> None:
        """Raise CheckpointError unless a candidate of that name has as many tokens."""
        if size != self.vocabulary:
            raise CheckpointError(
                f"{name} has {size} tokens, {self.path.name} was made with {self.vocabulary}", hint="they are not the same model"
            )

    def windows(self, bos: int | None) -> Ids:
        """What a model is run on: int64 (chunks, window), each beginning with ``bos`` unless it is None."""
        out = self.tokens.copy()
        if bos is not None:
            out[:, 0] = bos
        return out

    def chunk(self, index: int) -> LlamaWindow:
        """One chunk, decoded."""
        raw = np.frombuffer(self._file.read(self._data + index * self._chunk_bytes, self._chunk_bytes), "<u2")
        rows = raw.reshape(self._rows, -1)
        scale, lowest = np.ascontiguousarray(rows[:, :4]).view("<f4").T  # (n,) each
        logp = rows[:, 4 : 4 + self.vocabulary].astype(np.float32) * scale[:, None] + lowest[:, None]
        return LlamaWindow(logp, self.tokens[index, self.window // 2 + 1 :])


def write_llama_reference(
    path: Path, tokens: Ids, vocabulary: int, logits: Iterable[torch.Tensor], replace: bool = False
) -> None:
    """Write such a file, for llama.cpp to read, one chunk in memory at a time.

    tokens: int64 (chunks, window), of the text: where the model wants a beginning-of-text token, llama.cpp puts it in the first
    place of each. logits: of each chunk, at the scored positions, float32 (n, vocabulary). Raises CalibrationError if there is
    no chunk, OutputError if the file exists or cannot be written.
    """
    if not len(tokens):
        raise CalibrationError("the text is shorter than one window", hint="give a longer text with --text")
    refuse_existing(path, replace)
    chunks, window = tokens.shape
    rows = window - window // 2 - 1
    size = HEADER + 4 * tokens.size + 2 * chunks * rows * _row_numbers(vocabulary)
    with atomic_file(path, size) as handle:
        handle.write(MAGIC + np.array([window, vocabulary, chunks], "<i4").tobytes() + tokens.astype("<i4").tobytes())
        for chunk in logits:
            handle.write(_encode(chunk.numpy()).tobytes())
        if handle.tell() != size:
            raise ValueError(f"logits of {handle.tell()} bytes instead of {size}")


def _encode(logits: Floats) -> npt.NDArray[np.uint16]:
    """Rows of 16-bit numbers, all arithmetic in float32 as there."""
    top = logits.max(-1, keepdims=True)
    low = np.maximum(logits.min(-1, keepdims=True), top + np.float32(FLOOR))
    total = np.log(np.exp(logits - top).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (top - low) / np.float32(65535)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    out = np.zeros((len(logits), _row_numbers(logits.shape[1])), "<u2")
    out[:, 0:2], out[:, 2:4] = scale.astype("<f4").view("<u2"), (low - top - total).astype("<f4").view("<u2")
    out[:, 4 : 4 + logits.shape[1]] = np.rint(inverse * np.maximum(logits - low, 0)).astype("<u2")
    return out


@dataclass(frozen=True)
class LlamaStatistics:
    """What ``llama-perplexity --kl-divergence`` prints, in its convention. KLD in nats per token, each mean with its error.

    delta_p: probability of the text's token, candidate − original, root of the mean square.
    """

    tokens: int
    perplexity: float
    base_perplexity: float
    log_ratio: float
    log_ratio_error: float
    mean_kld: float
    mean_kld_error: float
    median_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    delta_p: float
    same_top: float


def llama_statistics(scores: TokenScores) -> LlamaStatistics:
    """From :class:`quantkit.metrics.TokenScores` that were judged against :class:`LlamaWindow`."""
    d = summarize(scores)
    logp, base = scores.logp.astype(np.float64), scores.reference_logp.astype(np.float64)
    return LlamaStatistics(
        d.tokens, d.perplexity, d.reference_perplexity, math.log(d.perplexity_ratio), d.perplexity_ratio_error / d.perplexity_ratio,
        d.mean_kld, d.mean_kld_error, d.median_kld, d.p99_kld, d.p999_kld, d.max_kld,
        float(np.sqrt(((np.exp(logp) - np.exp(base)) ** 2).mean())), d.top1_agreement,
    )  # fmt: skip
