"""The parts of evaluation.py that are about `compare`: the kept original, what judging costs, comparisons of known outcome.

Every part is a function of a Bench that gives rows; a row with a ``limit`` says whether it was ``reached``.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from allocation import JUDGED, calibration_files
from common import SHARED
from safetensors.torch import load_file, save_file

from quantkit.analysis.calibration import calibrate
from quantkit.analysis.texts import load_calibration
from quantkit.checkpoint import open_checkpoint
from quantkit.evaluation import runners
from quantkit.evaluation.breakdown import ExactWindow
from quantkit.evaluation.compare import Candidate, compare, evaluation_windows
from quantkit.evaluation.lm_eval.paired import paired
from quantkit.evaluation.lm_eval.run import Options, evaluate_models
from quantkit.evaluation.lm_eval.tasks import DEFAULT
from quantkit.evaluation.reference import Reference, ReferenceKey, ReferenceWriter
from quantkit.modeling.products import fast_float32
from quantkit.modeling.text import TextEncoder
from quantkit.planning.standard import standard_plan, uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer.pipeline import run as write_file

Row = dict[str, Any]
Pair = tuple[float, float]
MODELS = ("qk-dense-6m", "qk-moe-11m")
MIXES = ("Q8_0", "Q4_K_M", "Q2_K")
WINDOW, WINDOWS = 512, 16  # 16 · 255 = 4,080 scored tokens
CALIBRATION_TOKENS = 50_000
SHARE_LIMITS = {4096: 0.25, 32_000: 0.05, 152_000: 0.05}  # of the float32 logits
ERROR_LIMIT = 0.01  # of the mean KL divergence
ROUNDING = "rounding"  # noise like that of rounding; the others are Student's t
NOISES = (
    (ROUNDING, 0.05),
    (ROUNDING, 0.6),
    ("t, 5 degrees of freedom", 0.05),
    ("t, 5 degrees of freedom", 0.2),
    ("t, 3 degrees of freedom", 0.05),
)
UNLIMITED = ("t, 3 degrees of freedom",)  # where single tokens of no chance become likely; shown, without a limit
LARGE = (32_000, 152_000)  # vocabularies of which there is no model here
JUDGED_NOISE = 2  # windows of 255 tokens
OVERHEAD_LIMIT, OVERHEAD_WINDOWS, REPEATS = 0.10, 64, 3  # 32,768 tokens, as the other benchmarks judge
FIVE = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q2_K")
WRECKED_LAYER = "model.layers.3.mlp.down_proj.weight"
TASK_DOCUMENTS = 200  # of each task, and of each of BLiMP's paradigms
METRICS = {"mean_kld": 1, "median_kld": 1, "p99_kld": 1, "p999_kld": 1, "perplexity_ratio": 1, "top1_agreement": -1}


@dataclass
class Bench:
    """What the parts share. quick: a fraction of windows and documents, to try whether everything runs."""

    folder: Path
    quick: bool
    _files: dict[str, dict[str, Path]] = field(default_factory=dict)

    def count(self, whole: int) -> int:
        """So many windows or repetitions, or a few."""
        return max(2, whole // 8) if self.quick else whole

    def files(self, name: str) -> dict[str, Path]:
        """Q8_0 … Q2_K of a model as `--plan standard:MIX` makes them, and F32, written once."""
        if name not in self._files:
            place = self.folder / name
            place.mkdir()
            checkpoint = open_checkpoint(SHARED / "models" / name)
            text = load_calibration(checkpoint, calibration_files(place), CALIBRATION_TOKENS)
            stats = calibrate(checkpoint, text, Progress()).stats
            plans = {mix: standard_plan(checkpoint, mix, stats) for mix in FIVE} | {"F32": uniform_plan(checkpoint, "F32", None)}
            for mix, plan in plans.items():
                write_file(checkpoint, plan, place / f"{name}-{mix}.gguf", stats=stats)
            self._files[name] = {mix: place / f"{name}-{mix}.gguf" for mix in plans}
        return self._files[name]


def shown(row: Row) -> Row:
    """The row, after it was printed: numbers short, lists and what says nothing left out."""
    parts = (
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if not isinstance(value, list | dict) and name not in ("reached", "table")
    )
    print(("" if row.get("reached", True) else "MISSED ") + f"{row['table']}: " + ", ".join(parts), flush=True)
    return row


def kept(bench: Bench) -> list[Row]:
    """The kept original: its size, and what a comparison from it is off by."""
    rows = [row for name in MODELS for row in _kept_model(bench, name)]
    for vocabulary in LARGE:
        rows += _kept_random(bench, vocabulary)
    return rows


def _kept_model(bench: Bench, name: str) -> Iterator[Row]:
    """Candidates judged against the model itself, then out of the file; on each judged text."""
    model, candidates = SHARED / "models" / name, [bench.files(name)[mix] for mix in MIXES]
    for number, (text, file) in enumerate(JUDGED.items()):
        path, limit = bench.folder / f"{name}-{number}.kept", WINDOW * bench.count(WINDOWS)
        exact, found = (compare(model, candidates, [SHARED / "data" / file], limit=limit, cache=c) for c in (None, path))
        if number == 0:
            yield _share(name, Reference(path))
        for mix, a, b in zip(MIXES, exact.candidates, found.candidates, strict=True):
            numbers = ((one.divergence.mean_kld, one.divergence.p999_kld) for one in (a, b))
            ratio = b.divergence.perplexity_ratio / a.divergence.perplexity_ratio - 1
            agreement = b.divergence.top1_agreement - a.divergence.top1_agreement
            known = {"perplexity_ratio_error": ratio, "top1_difference": agreement}
            yield shown(_error(name, text, mix, exact.tokens, *numbers, b.estimate_error) | known)


def _share(original: str, reference: Reference) -> Row:
    limit = SHARE_LIMITS[reference.key.vocabulary]
    tokens = len(reference) * (reference.key.window - reference.key.window // 2 - 1)
    return shown({
        "table": "share", "original": original, "vocabulary": reference.key.vocabulary, "tokens": tokens,
        "bytes": reference.path.stat().st_size, "share": reference.share, "limit": limit, "reached": reference.share <= limit,
    })  # fmt: skip


def _error(
    original: str, text: str, candidate: str, tokens: int, exact: Pair, found: Pair, said: float, limited: bool = True
) -> Row:
    """exact, found: the mean divergence and its 99.9 % quantile. said: the standard error that `compare` prints."""
    error = found[0] / exact[0] - 1
    row = {
        "table": "error", "original": original, "text": text, "candidate": candidate, "tokens": tokens, "kld": exact[0],
        "kld_kept": found[0], "error": error, "error_said": said / exact[0], "p999_error": found[1] / exact[1] - 1,
    }  # fmt: skip
    return row | ({"limit": ERROR_LIMIT, "reached": abs(error) <= ERROR_LIMIT} if limited else {})


def random_logits(vocabulary: int, seed: int) -> torch.Tensor:
    """Like a language model's, float32 (255, vocabulary): frequent tokens, some that fit, sure and unsure positions."""
    chance, n = torch.Generator().manual_seed(seed), WINDOW - WINDOW // 2 - 1
    frequency = -torch.arange(1, vocabulary + 1).float().log()[torch.randperm(vocabulary, generator=chance)]
    sureness = 0.35 + 0.8 * torch.rand(n, 1, generator=chance)
    return (frequency + 2.5 * torch.randn(n, vocabulary, generator=chance)) / sureness


def noisy(logits: torch.Tensor, kind: str, size: float, seed: int) -> torch.Tensor:
    """A less sure model with noise: normal and larger at unlikely tokens, as rounding makes it, or with Student's heavy tails."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.shape, generator=chance)
    if kind == ROUNDING:
        return logits * (1 - size / 5) + size / 3 * noise.mul_(1 - 0.15 * logits.log_softmax(-1))
    freedom, spread = int(kind.split()[1]), torch.zeros_like(logits)
    for _ in range(freedom):
        spread += torch.randn(logits.shape, generator=chance).square_()
    return logits * (1 - size / 5) + size * noise.div_(spread.div_(freedom).sqrt_())


def _kept_random(bench: Bench, vocabulary: int) -> Iterator[Row]:
    """A file of random distributions, because there is no model of such a vocabulary here; judged on some of its windows."""
    path, name = bench.folder / f"random-{vocabulary}.kept", f"random, {vocabulary:,} words"
    windows = np.random.default_rng(0).integers(0, vocabulary, (bench.count(WINDOWS), WINDOW))
    key = ReferenceKey(name, "", "", "", 0, "torch", "", vocabulary, WINDOW, "", (("random", len(windows)),))
    with ReferenceWriter(path, key, windows, [f"word {i:06}" for i in range(vocabulary)]) as writer:
        for index in list(writer.missing):
            writer.add(index, random_logits(vocabulary, index))
    reference = Reference(path)
    yield _share(name, reference)
    found: dict[tuple[str, float], list[np.ndarray]] = {noise: [] for noise in NOISES}
    for index in range(JUDGED_NOISE):
        logits = random_logits(vocabulary, index)
        exact, stored = ExactWindow.of(logits, windows[index, WINDOW // 2 + 1 :]), reference.window(index)
        for noise in NOISES:
            candidate = noisy(logits, *noise, 1000 + index)
            estimate = stored.divergence(candidate)
            columns = (exact.divergence(candidate).kld, estimate.kld, estimate.variance)
            found[noise].append(np.array(columns, dtype=np.float64))
    for (kind, size), parts in found.items():
        sure, kld, variance = np.concatenate(parts, 1)
        numbers = ((float(values.mean()), float(np.quantile(values, 0.999))) for values in (sure, kld))
        said = float(np.sqrt(variance.sum())) / len(kld)
        yield shown(
            _error(name, "random", f"noise ({kind}) of {size:g}", len(kld), *numbers, said, limited=kind not in UNLIMITED)
        )


@fast_float32()
def passes(paths: list[Path], windows: np.ndarray) -> tuple[float, float]:
    """Seconds of loading the models one after the other, and of running their windows; nothing is done with the logits."""
    loading = running = 0.0
    for path in paths:
        started = time.perf_counter()
        runner = runners.TorchRunner(open_checkpoint(path))
        loaded = time.perf_counter()
        for ids in windows:
            runner.logits(ids)
        loading, running = loading + loaded - started, running + time.perf_counter() - loaded
        runner.close()
    return loading, running


class Counted(runners.TorchRunner):
    """A runner that counts, by the model's name, loads and tokens; and the seconds in which models load and run."""

    tokens: ClassVar[Counter[str]] = Counter()
    loads: ClassVar[Counter[str]] = Counter()
    seconds: ClassVar[float] = 0.0

    def __init__(self, checkpoint: Any, *options: Any) -> None:
        started = time.perf_counter()
        super().__init__(checkpoint, *options)
        Counted.seconds += time.perf_counter() - started
        self._name = checkpoint.path.name
        Counted.loads[self._name] += 1

    def logits(self, ids: Any) -> Any:
        started = time.perf_counter()
        found = super().logits(ids)
        Counted.seconds += time.perf_counter() - started
        Counted.tokens[self._name] += len(ids)
        return found


def counted(model: Path, candidates: list[Path], text: Path) -> tuple[float, float]:
    """Seconds of a comparison, and of the models in it; ``Counted`` then has its tokens."""
    Counted.tokens.clear()
    Counted.loads.clear()
    Counted.seconds = 0.0
    with mock.patch.object(runners, "TorchRunner", Counted):
        started = time.perf_counter()
        compare(model, candidates, [text], limit=None)
        return time.perf_counter() - started, Counted.seconds


def excerpt(bench: Bench, model: Path, windows: int) -> Path:
    """The beginning of WikiText-2's test split, just long enough: `compare` tokenizes all of a text, whatever its limit."""
    whole, encoder = (
        (SHARED / "data" / JUDGED["WikiText-2 test"]).read_text(encoding="utf-8"),
        TextEncoder(open_checkpoint(model)),
    )
    characters = windows * WINDOW
    while len(encoder.windows(whole[:characters], WINDOW)) < windows:
        characters += WINDOW
    path = bench.folder / "excerpt.txt"
    path.write_text(whole[:characters], encoding="utf-8")
    return path


def overhead(bench: Bench) -> list[Row]:
    """A comparison of five candidates against nothing but running the six models; best of interleaved repetitions."""
    torch.set_num_threads(2)
    model = SHARED / "models" / MODELS[0]
    candidates, text = [bench.files(MODELS[0])[mix] for mix in FIVE], excerpt(bench, model, bench.count(OVERHEAD_WINDOWS))
    windows = evaluation_windows(open_checkpoint(model), [text], WINDOW, None)
    counted(model, candidates, text)  # warms up, too
    passes([model, *candidates], windows)
    rows: list[Row] = []
    for path in (model, *candidates):
        tokens, loads = Counted.tokens[path.name], Counted.loads[path.name]
        reached = (tokens, loads) == (windows.size, 1)
        rows.append(
            shown(
                {
                    "table": "tokens",
                    "model": path.name,
                    "tokens": tokens,
                    "loads": loads,
                    "limit": windows.size,
                    "reached": reached,
                }
            )
        )
    alone, whole = [], []
    for _ in range(REPEATS):
        alone.append(passes([model, *candidates], windows))
        whole.append(counted(model, candidates, text))
    return [*rows, _overhead(windows.size, alone, whole)]


def _overhead(tokens: int, alone: list[Pair], whole: list[Pair]) -> Row:
    """alone: (loading, running) of the passes alone, whole: (comparison, of that the models), seconds of each repetition.

    ``overhead`` is the best comparison against the best passes with loading; ``inside`` is what one comparison spent beside
    its own models, where the noise of two measurements does not count.
    """
    loading, running = (min(column) for column in zip(*alone, strict=True))
    seconds = min(whole)[0]
    found = seconds / (loading + running) - 1
    return shown({
        "table": "overhead", "candidates": len(FIVE), "tokens": tokens, "threads": torch.get_num_threads(), "loading_s": loading,
        "passes_s": running, "compare_s": seconds, "overhead": found, "over_bare_passes": seconds / running - 1,
        "inside": min(both / models - 1 for both, models in whole), "alone_all": alone, "whole_all": whole,
        "limit": OVERHEAD_LIMIT, "reached": found <= OVERHEAD_LIMIT,
    })  # fmt: skip


def wrecked_file(bench: Bench, name: str) -> Path:
    """A Q8_0 file of a model in which one matrix is noise of three times its size."""
    folder = bench.folder / "wrecked"
    shutil.copytree(SHARED / "models" / name, folder, copy_function=shutil.copyfile)
    values = load_file(folder / "model.safetensors")
    layer = values[WRECKED_LAYER]
    noise = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    values[WRECKED_LAYER] = (3 * noise * layer.float().std()).to(layer.dtype)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, path = open_checkpoint(folder), bench.folder / f"{name}-wrecked-Q8_0.gguf"
    write_file(checkpoint, uniform_plan(checkpoint, "Q8_0", None), path)
    return path


def sanity(bench: Bench) -> list[Row]:
    """The original against itself loses nothing; one wrecked layer comes last; the same in tasks."""
    name = MODELS[0]
    model, files, wrecked = SHARED / "models" / name, bench.files(name), wrecked_file(bench, name)
    candidates = {"itself": model, **{mix: files[mix] for mix in ("F32", *MIXES)}, "one wrecked layer": wrecked}
    rows: list[Row] = []
    for text, file in JUDGED.items():
        limit = WINDOW * bench.count(WINDOWS)
        found = compare(model, list(candidates.values()), [SHARED / "data" / file], limit=limit).candidates
        rows += _known_outcome(text, dict(zip(candidates, found, strict=True)))
    return [*rows, *_flips(bench, [model, files["F32"], wrecked])]


def _known_outcome(text: str, found: dict[str, Candidate]) -> Iterator[Row]:
    """A row for each candidate, and one for each metric: whether the wrecked one is the worst, and alone in that."""
    for what, one in found.items():
        row = {
            "table": "compared",
            "text": text,
            "candidate": what,
            **{metric: getattr(one.divergence, metric) for metric in METRICS},
        }
        if what in ("itself", "F32"):
            row |= {
                "max_kld": one.divergence.max_kld,
                "limit": 0.0,
                "reached": one.divergence.max_kld == 0 and row["top1_agreement"] == 1,
            }
        yield shown(row)
    *others, wrecked = found.values()
    for metric, sign in METRICS.items():
        values = [sign * getattr(one.divergence, metric) for one in (wrecked, *others)]
        yield shown(
            {
                "table": "ranks",
                "text": text,
                "metric": metric,
                "last": "one wrecked layer",
                "reached": values[0] > max(values[1:]),
            }
        )


def _flips(bench: Bench, models: list[Path]) -> Iterator[Row]:
    """models: the original, the same as F32, which may change no answer, and the wrecked one."""
    limit = bench.count(TASK_DOCUMENTS)
    report = evaluate_models(models, Options(tasks=DEFAULT, data=SHARED / "data", limit=limit, work=bench.folder / "sanity"))
    for one in paired(report):
        assert one.flips is not None  # there is one answer to a document
        row = {
            "table": "flips", "task": one.task, "metric": one.metric, "model": one.model, "documents": one.flips.total,
            "lost": one.flips.lost, "gained": one.flips.gained, "p_value": one.flips.p_value,
        }  # fmt: skip
        if one.model == report.models[1].name:
            row |= {"limit": 0, "reached": one.flips.lost == one.flips.gained == 0}
        yield shown(row)
