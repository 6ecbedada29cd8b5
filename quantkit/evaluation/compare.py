"""Was it worth it: any number of candidates against the original on the same text.

Windows much as in llama-perplexity: the text in pieces of ``window`` tokens, each beginning with the
beginning-of-text token where the model wants one; the second half of every window is scored. (There the
token takes the place of the text's first one, here it stands before it, so that no text is lost.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.texts import read_text
from quantkit.checkpoint import Checkpoint, open_checkpoint, require_readable
from quantkit.checkpoint.documents import strict_json
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.evaluation.breakdown import Breakdown, ExactWindow, KnownWindow, Tally, judge
from quantkit.evaluation.candidates import open_candidate, shown_names
from quantkit.evaluation.footprint import Footprint
from quantkit.evaluation.llama_reference import LlamaReference, is_llama_reference
from quantkit.evaluation.reference import Reference, ReferenceKey, ReferenceWriter, is_reference, words_of
from quantkit.evaluation.runners import Runner, RunnerPool, ran_on, runtime_and_device
from quantkit.metrics import Divergence, TokenScores, summarize
from quantkit.modeling.products import fast_float32
from quantkit.modeling.text import TextEncoder
from quantkit.progress import Progress
from quantkit.quantizer.hashes import known_sha256
from quantkit.quantizer.manifest import Manifest, manifest_path
from quantkit.versions import package_versions

REFERENCE_BYTES = 1 << 30  # probabilities of the original and their logarithms, held at a time
VERSION = 1
ROUNDING = 1e-6  # nats per token that two runs of the same model may be apart


@dataclass
class Candidate:
    """One row of the table. identity, sha256: which file it is, as in ``board.Row``."""

    name: str
    file_bytes: int
    bpw: float
    divergence: Divergence
    predicted_kld: float | None = None
    plan: dict[str, str] = field(default_factory=dict)
    estimate_error: float = 0.0  # of the mean divergence, from a stored original; nats per token
    breakdown: Breakdown | None = None
    identity: str = ""
    sha256: str | None = None
    footprint: Footprint | None = None


@dataclass
class Report:
    """Numbers of one comparison; rendered to the terminal, to JSON and to HTML.

    text_identity: SHA-256 of the windows of token ids. reference_footprint: what running the original takes, if measured.
    """

    reference: str
    reference_bytes: int
    architecture: str
    runtime: str
    texts: list[str]
    tokens: int
    window: int
    candidates: list[Candidate]
    versions: dict[str, str] = field(default_factory=dict)
    reference_identity: str = ""
    text_identity: str = ""
    reference_footprint: Footprint | None = None

    def to_json(self) -> str:
        """The document as text."""
        return strict_json({"quantkit_report": VERSION, **asdict(self)}, indent=1)


def worst_estimate(report: Report) -> float:
    """The largest standard error that a kept original adds to a mean KLD, relative to it; 0 without one.

    Divergences that are hardly more than rounding do not count.
    """
    return max(
        (c.estimate_error / c.divergence.mean_kld for c in report.candidates if c.divergence.mean_kld > ROUNDING), default=0.0
    )


def evaluation_windows(checkpoint: Checkpoint, texts: list[Path], window: int, limit: int | None) -> npt.NDArray[np.int64]:
    """All whole windows of the texts, int64 (n, window), at most ``limit`` tokens, shared by the texts.

    Raises CalibrationError if a text has not one whole window.
    """
    return windows_of_texts(checkpoint, texts, window, limit)[0]


def windows_of_texts(
    checkpoint: Checkpoint, texts: list[Path], window: int, limit: int | None
) -> tuple[npt.NDArray[np.int64], list[tuple[str, int]]]:
    """As ``evaluation_windows``, and (name, windows) of each text."""
    encoder = TextEncoder(checkpoint)
    share = max(1, limit // window // len(texts)) if limit else None
    rows = [encoder.windows(read_text(path, encoder), window)[:share] for path in texts]
    for path, some in zip(texts, rows, strict=True):
        if not some:
            hint = "give a longer text with --text, or shorter windows with --window"
            raise CalibrationError(f"{path.name} has fewer than {window} tokens", hint=hint)
    counts = [(path.name, len(some)) for path, some in zip(texts, rows, strict=True)]
    return np.array([ids for some in rows for ids in some], dtype=np.int64), counts


@dataclass
class Original:
    """What candidates are compared with: a model that is run (checkpoint), or what was kept of one (stored)."""

    name: str
    identity: str
    file_bytes: int
    architecture: str
    windows: npt.NDArray[np.int64]
    texts: list[tuple[str, int]]
    words: list[str] | None
    vocabulary: int
    checkpoint: Checkpoint | None = None
    stored: Reference | LlamaReference | None = None


def open_original(path: Path, texts: list[Path], window: int, limit: int | None, candidates: list[Checkpoint]) -> Original:
    """A model, a file of ``reference.py`` or one of llama.cpp's; the latter two bring their text with them.

    candidates: their tokenizer says how llama.cpp's windows begin. Raises CheckpointError if a file is damaged.
    """
    if is_reference(path):
        kept = Reference(path)
        key = kept.key
        return Original(
            key.name, key.identity, key.file_bytes, key.architecture, kept.windows, list(key.texts), kept.words, key.vocabulary,
            stored=kept,
        )  # fmt: skip
    if is_llama_reference(path):
        base = LlamaReference(path)
        windows = base.windows(TextEncoder(candidates[0]).bos)
        return Original(
            path.name,
            _llama_identity(path),
            path.stat().st_size,
            candidates[0].family.arch,
            windows,
            [(path.name, len(windows))],
            None,
            base.vocabulary,
            stored=base,
        )
    model = open_checkpoint(path)
    context = int(model.config.get("max_position_embeddings") or window)
    windows, counts = windows_of_texts(model, texts, min(window, context), limit)
    return Original(
        path.resolve().name,
        model.identity,
        _bytes_of(model),
        model.family.arch,
        windows,
        counts,
        words_of(model),
        int(model.config["vocab_size"]),
        checkpoint=model,
    )


def is_kept(reference: Path) -> bool:
    """Whether an original is what was kept of one, by quantkit or by llama-perplexity."""
    return is_reference(reference) or is_llama_reference(reference)


def identity_of(reference: Path) -> str:
    """Identity of an original, also of one of which only its distributions were kept."""
    if is_reference(reference):
        return Reference(reference).key.identity
    return _llama_identity(reference) if is_llama_reference(reference) else open_checkpoint(reference).identity


def _llama_identity(path: Path) -> str:
    """A file of llama-perplexity does not say of which model it is."""
    return f"{path.name}, {path.stat().st_size} bytes"


def keep_original(original: Original, runners: RunnerPool, path: Path, runtime: str, task: Any) -> None:
    """Run the original unless ``path`` holds it already, and take what is known of it from there."""
    assert original.checkpoint is not None
    key = ReferenceKey.of(original.checkpoint, original.windows, original.texts, runtime)
    if not path.exists():
        half = original.windows.shape[1] // 2
        with (
            ReferenceWriter(path, key, original.windows, words_of(original.checkpoint)) as writer,
            runners.use(original.checkpoint) as runner,
        ):
            for index in list(writer.missing):
                writer.add(index, runner.logits(original.windows[index])[half:-1])
                task.advance(original.windows.shape[1])
    original.stored = Reference(path)
    original.stored.key.require(key, path.name)


@fast_float32()
def compare(
    reference: Path, candidates: list[Path], texts: list[Path], *,
    runtime: str = "torch", window: int = 512, limit: int | None = None, device: str = "cpu",
    cache: Path | None = None, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Compare candidates with the original in one pass over the reference.

    reference: a model, or what was kept of one. cache: where to keep it; if it is there, the original is not run.
    device: where torch runs them; away from the CPU the weights of a quantized GGUF stay packed.

    Raises CheckpointError if a candidate has another vocabulary, CalibrationError if the text is too short.
    """
    progress = progress or Progress()
    opened = [open_candidate(path) for path in candidates]
    original = open_original(reference, texts, window, limit, opened)
    ran = ran_on(runtime, device)
    if isinstance(original.stored, Reference):
        _check_same_runtime(original.stored, ran, reference)
    for path, other in zip(candidates, opened, strict=True):
        require_readable(other)
        _check_same_vocabulary(original, other, path)
    windows = original.windows
    judgements = [_Judgement(Tally(windows, original.texts)) for _ in opened]
    models = [m for m in (original.checkpoint, *opened) if m is not None]
    task = progress.task("compare", total=windows.size * len(models), unit="tokens")
    with RunnerPool(runtime, windows.shape[1], models, len(windows) > _chunk(original), device) as runners:
        if cache is not None and original.checkpoint is not None:
            keep_original(original, runners, cache, ran, task)
        step = len(windows) if original.stored else _chunk(original)
        for start in range(0, len(windows), step):
            some = range(start, min(start + step, len(windows)))
            known = _known(original, runners, some, task)
            for checkpoint, judgement in zip(opened, judgements, strict=True):
                with runners.use(checkpoint) as runner:
                    judgement.add(runner, windows, known, some, task)
    task.done()
    decode = TextEncoder(opened[0]).decode  # they all have the same vocabulary
    names = shown_names([reference, *candidates])[1:]
    rows = [
        _candidate(path, name, checkpoint, judgement, decode)
        for path, name, checkpoint, judgement in zip(candidates, names, opened, judgements, strict=True)
    ]
    return Report(
        reference=original.name,
        reference_bytes=original.file_bytes,
        architecture=original.architecture,
        runtime=ran,
        texts=[name for name, _ in original.texts],
        tokens=rows[0].divergence.tokens if rows else 0,
        window=windows.shape[1],
        candidates=rows,
        versions=package_versions("torch", "transformers", *(("llama-cpp-python",) if runtime == "llama" else ())),
        reference_identity=original.identity,
        text_identity=hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
    )


def _check_same_runtime(kept: Reference, ran: str, path: Path) -> None:
    """Two runtimes do not round alike, which would count as divergence."""
    if kept.key.runtime != ran:
        there, device = runtime_and_device(kept.key.runtime)
        hint = f"use --runtime {there} --device {device}, or keep the original anew"
        raise CheckpointError(f"{path.name} was kept of {kept.key.runtime}, the candidates would be run by {ran}", hint=hint)


def _check_same_vocabulary(original: Original, other: Checkpoint, path: Path) -> None:
    b = words_of(other)
    a = original.words if original.words is not None else b
    if isinstance(original.stored, LlamaReference):
        original.stored.require_vocabulary(len(b), path.name)
    if len(a) != len(b):
        raise CheckpointError(f"{path.name} has {len(b)} tokens, the original {len(a)}", hint="they are not the same model")
    different = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
    if different is not None:
        raise CheckpointError(
            f"{path.name}: token {different} is {b[different]!r}, in the original {a[different]!r}",
            hint="they are not the same model",
        )


def _chunk(original: Original) -> int:
    """Windows whose whole distributions are held at a time."""
    window = original.windows.shape[1]
    return max(1, REFERENCE_BYTES // (8 * (window - window // 2 - 1) * original.vocabulary))


def _known(original: Original, runners: RunnerPool, some: range, task: Any) -> Callable[[int], KnownWindow]:
    """What is known of the original in these windows, by number: read when asked for, or run now."""
    if isinstance(original.stored, Reference):
        return original.stored.window
    if isinstance(original.stored, LlamaReference):
        return original.stored.chunk
    assert original.checkpoint is not None
    half, found = original.windows.shape[1] // 2, {}
    with runners.use(original.checkpoint) as runner:
        for index in some:
            ids = original.windows[index]
            found[index] = ExactWindow.of(runner.logits(ids)[half:-1], ids[half + 1 :])
            task.advance(len(ids))
    return found.__getitem__


@dataclass
class _Judgement:
    """One candidate so far."""

    tally: Tally
    parts: list[TokenScores] = field(default_factory=list)
    variance: float = 0.0

    def add(
        self, runner: Runner, windows: npt.NDArray[np.int64], known: Callable[[int], KnownWindow], some: range, task: Any
    ) -> None:
        half = windows.shape[1] // 2
        for index in some:
            ids, window = windows[index], known(index)
            judged = judge(window, runner.logits(ids)[half:-1], ids[half + 1 :])
            self.tally.add(index, window, judged)
            self.parts.append(judged.scores)
            self.variance += float(judged.variance.sum())
            task.advance(len(ids))


def _candidate(
    path: Path, name: str, checkpoint: Checkpoint, judgement: _Judgement, decode: Callable[[list[int]], str]
) -> Candidate:
    scores = TokenScores.join(judgement.parts)
    data = sum(checkpoint.nbytes(name) for name in checkpoint.tensors)
    predicted = None
    if path.exists() and manifest_path(path).exists():
        predicted = Manifest.read(manifest_path(path)).plan.get("predicted_kld")
    return Candidate(
        name=name,
        file_bytes=_bytes_of(checkpoint),
        bpw=8 * data / checkpoint.n_weights,
        divergence=summarize(scores),
        estimate_error=math.sqrt(judgement.variance) / len(scores.kld),
        breakdown=judgement.tally.result(decode),
        predicted_kld=predicted,
        plan={t.name: t.dtype for t in checkpoint.tensors.values() if t.quantizable},
        identity=checkpoint.identity,
        sha256=known_sha256(checkpoint),
    )


def _bytes_of(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in checkpoint.weight_files)
