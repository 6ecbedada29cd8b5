"""Was it worth it: any number of candidates against the original on the same text.

Windows as in llama-perplexity: the text in pieces of ``window`` tokens, each beginning with the
beginning-of-text token where the model wants one; the second half of every window is scored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.texts import read_text
from quantkit.checkpoint import Checkpoint, open_checkpoint, require_readable
from quantkit.checkpoint.adapter import AdaptedCheckpoint, read_adapter
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.evaluation.runners import Runner, RunnerPool
from quantkit.metrics import Divergence, TokenScores, kl_divergence, summarize
from quantkit.modeling.products import fast_float32
from quantkit.modeling.text import TextEncoder
from quantkit.progress import Progress
from quantkit.quantizer.manifest import Manifest, manifest_path
from quantkit.versions import package_versions

REFERENCE_BYTES = 1 << 30  # log-probabilities of the original held at a time
VERSION = 1


@dataclass
class Candidate:
    """One row of the table."""

    name: str
    file_bytes: int
    bpw: float
    divergence: Divergence
    predicted_kld: float | None = None
    plan: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """Numbers of one comparison; rendered to the terminal, to JSON and to HTML."""

    reference: str
    reference_bytes: int
    architecture: str
    runtime: str
    texts: list[str]
    tokens: int
    window: int
    candidates: list[Candidate]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps({"quantkit_report": VERSION, **asdict(self)}, indent=1)


def evaluation_windows(checkpoint: Checkpoint, texts: list[Path], window: int, limit: int | None) -> npt.NDArray[np.int64]:
    """All whole windows of the texts, int64 (n, window), at most ``limit`` tokens, shared by the texts.

    Raises CalibrationError if there is not one whole window.
    """
    encoder = TextEncoder(checkpoint)
    share = max(1, limit // window // len(texts)) if limit else None
    rows = []
    for path in texts:
        rows += encoder.windows(read_text(path, encoder), window)[:share]
    if not rows:
        raise CalibrationError(f"the text has fewer than {window} tokens", hint="give a longer text with --text")
    return np.array(rows, dtype=np.int64)


@fast_float32()
def compare(
    reference: Path, candidates: list[Path], texts: list[Path], *,
    runtime: str = "torch", window: int = 512, limit: int | None = None, device: str = "cpu", progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Compare candidates with the original in one pass over the reference.

    device: where torch runs them; away from the CPU the weights of a quantized GGUF stay packed.

    Raises CheckpointError if a candidate has another vocabulary, CalibrationError if the text is too short.
    """
    progress = progress or Progress()
    original = open_checkpoint(reference)
    opened = [open_candidate(path) for path in candidates]
    for path, other in zip(candidates, opened, strict=True):
        require_readable(other)
        _check_same_vocabulary(original, other, path)
    context = int(original.config.get("max_position_embeddings") or window)
    windows = evaluation_windows(original, texts, min(window, context), limit)
    window = windows.shape[1]
    per_window = (window - window // 2 - 1) * int(original.config["vocab_size"]) * 4
    chunk = max(1, REFERENCE_BYTES // per_window)
    task = progress.task("compare", total=windows.size * (1 + len(opened)), unit="tokens")
    parts: list[list[TokenScores]] = [[] for _ in opened]
    with RunnerPool(runtime, window, [original, *opened], len(windows) > chunk, device) as runners:
        for start in range(0, len(windows), chunk):
            some = windows[start : start + chunk]
            with runners.use(original) as runner:
                known = _reference_logp(runner, some, task)
            for i, checkpoint in enumerate(opened):
                with runners.use(checkpoint) as runner:
                    parts[i].append(_score(runner, some, known, task))
    task.done()
    rows = [
        _candidate(path, checkpoint, summarize(TokenScores.join(scores)))
        for path, checkpoint, scores in zip(candidates, opened, parts, strict=True)
    ]
    return Report(
        reference=reference.resolve().name,
        reference_bytes=_bytes_of(original),
        architecture=original.family.arch,
        runtime=runtime if device == "cpu" else f"{runtime} on {device}",
        texts=[path.name for path in texts],
        tokens=rows[0].divergence.tokens if rows else 0,
        window=window,
        candidates=rows,
        versions=package_versions("torch", "transformers", *(("llama-cpp-python",) if runtime == "llama" else ())),
    )


def open_candidate(path: Path) -> Checkpoint:
    """A model, or ``FILE+ADAPTER``: a model with a low-rank adapter added. Raises CheckpointError if they do not fit."""
    file, sign, adapter = str(path).rpartition("+")
    if not sign or path.exists():
        return open_checkpoint(path)
    return AdaptedCheckpoint(open_checkpoint(file), read_adapter(Path(adapter)))


def _check_same_vocabulary(original: Checkpoint, other: Checkpoint, path: Path) -> None:
    ours, theirs = original.metadata(), other.metadata()
    a, b = ours["tokenizer.ggml.tokens"].value, theirs["tokenizer.ggml.tokens"].value
    if len(a) != len(b):
        raise CheckpointError(f"{path.name} has {len(b)} tokens, the original {len(a)}", hint="they are not the same model")
    different = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
    if different is not None:
        raise CheckpointError(
            f"{path.name}: token {different} is {b[different]!r}, in the original {a[different]!r}",
            hint="they are not the same model",
        )


def _reference_logp(runner: Runner, windows: npt.NDArray[np.int64], task: Any) -> list[Any]:
    """Log-probabilities of the scored half of each window, torch float32 (positions, vocabulary)."""
    half = windows.shape[1] // 2
    out = []
    for ids in windows:
        out.append(runner.logits(ids)[half:-1].log_softmax(-1))
        task.advance(len(ids))
    return out


def _score(runner: Runner, windows: npt.NDArray[np.int64], known: list[Any], task: Any) -> TokenScores:
    import torch

    half = windows.shape[1] // 2
    parts = []
    for ids, reference in zip(windows, known, strict=True):
        logits = runner.logits(ids)[half:-1]
        labels = torch.from_numpy(ids[half + 1 :])[:, None]
        logp = logits.log_softmax(-1)
        parts.append(
            TokenScores(
                kld=kl_divergence(reference, logits).numpy(),
                logp=logp.gather(1, labels)[:, 0].numpy(),
                reference_logp=reference.gather(1, labels)[:, 0].numpy(),
                same_top=(logits.argmax(-1) == reference.argmax(-1)).numpy(),
            )
        )
        task.advance(len(ids))
    return TokenScores.join(parts)


def _candidate(path: Path, checkpoint: Checkpoint, divergence: Divergence) -> Candidate:
    data = sum(checkpoint.nbytes(name) for name in checkpoint.tensors)
    name, predicted = path.resolve().name, None
    if isinstance(checkpoint, AdaptedCheckpoint):
        name = f"{checkpoint.path.name}+{checkpoint.adapter.path.name}"
    if path.is_file() and manifest_path(path).exists():
        predicted = Manifest.read(manifest_path(path)).plan.get("predicted_kld")
    return Candidate(
        name=name,
        file_bytes=_bytes_of(checkpoint),
        bpw=8 * data / checkpoint.n_weights,
        divergence=divergence,
        predicted_kld=predicted,
        plan={t.name: t.dtype for t in checkpoint.tensors.values() if t.quantizable},
    )


def _bytes_of(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in checkpoint.weight_files)
