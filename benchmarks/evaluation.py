"""Every number of docs/evaluation.md: the kept original, llama-perplexity, lm-eval, what judging costs, known outcomes.

    make bench-evaluation                                            # everything
    python benchmarks/evaluation.py --only kept llama                # some parts; the others keep their rows
    python benchmarks/evaluation.py --quick                          # a fraction of everything; nothing is recorded

Parts: ``kept`` (size of a kept original, and what a comparison from it is off by), ``llama`` (divergence and perplexity
as llama-perplexity prints them), ``lm-eval`` (every answer to the default tasks as lm-eval's own class for transformers
gives it, and how fast), ``overhead`` (what judging adds to running the models), ``sanity`` (comparisons whose outcome is
known). Rows with a ``limit`` say whether it was ``reached``; the exit code is 1 if one was not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocation import JUDGED
from common import RESULTS, SHARED, TOOLS, environment, tool, write_results
from evaluation_compare import MIXES, MODELS, WINDOW, WINDOWS, Bench, Row, kept, overhead, sanity, shown

from quantkit.checkpoint import open_checkpoint
from quantkit.evaluation.breakdown import ExactWindow
from quantkit.evaluation.compare import compare
from quantkit.evaluation.llama_reference import LlamaReference
from quantkit.evaluation.lm_eval.results import ModelScores
from quantkit.evaluation.lm_eval.run import RESAMPLES, Options, evaluate_models
from quantkit.evaluation.lm_eval.tasks import DEFAULT, SEED, load_tasks, quietly
from quantkit.evaluation.runners import LlamaRunner, TorchRunner
from quantkit.modeling.products import fast_float32
from quantkit.modeling.text import TextEncoder
from quantkit.versions import package_versions

NAME = "evaluation"
TEXT = "WikiText-2 test"  # of the parts with one text
AGREEMENT = 1e-3  # relative, with llama-perplexity
DIGIT = {"kld": 1e-6, "perplexity": 1e-6, "windows": 1e-4}  # the last that it prints
FINAL = "Final estimate: PPL"
ATTEMPTS = 5
BATCHES = (1, 16)  # of lm-eval's own class; 1 is its default
EVAL_LIMIT = 15 * 60.0  # seconds for the four default tasks
QUICK_DOCUMENTS = 20


def perplexity_tool(*arguments: str | Path, until: str = "") -> str:
    """What llama-perplexity prints, on windows of 512 tokens, without its shortcuts in attention.

    until: a pattern of its last lines. It loses these at its exit about once in fifteen runs (its log is written by a thread),
    and is run again then; SystemExit with what was said if that does not help.
    """
    size = str(WINDOW)
    plain = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "2", "-c", size, "-b", size, "-ub", size)
    for _ in range(ATTEMPTS):
        said = tool("llama-perplexity", *arguments, *plain)
        if re.search(until, said):
            return said
    raise SystemExit(f"llama-perplexity printed no {until!r}:\n{said[-2000:]}")


def printed(said: str, pattern: str) -> float:
    """The number after a label, or SystemExit with what was said instead."""
    found = re.search(pattern + r"\s*[:=]\s*(-?[\d.]+)", said)
    if found is None:
        raise SystemExit(f"llama-perplexity printed no {pattern!r}:\n{said[-2000:]}")
    return float(found.group(1))


def agreement(kind: str, ours: float, theirs: float) -> Row:
    """Relative difference; reached within a thousandth or the last printed digit."""
    limit = max(AGREEMENT * theirs, DIGIT[kind])
    return {"difference": ours / theirs - 1, "limit": AGREEMENT, "digit": DIGIT[kind], "reached": abs(ours - theirs) <= limit}


def llama(bench: Bench) -> list[Row]:
    """Divergence from llama-perplexity's own file, from whole logits, and perplexity by windows."""
    files, text = bench.files(MODELS[0]), SHARED / "data" / JUDGED[TEXT]
    windows, base = bench.count(WINDOWS), bench.folder / "base.kld"
    original = files["F32"]
    perplexity_tool("-m", original, "-f", text, "--kl-divergence-base", base, "--chunks", str(windows))
    candidates = [files[mix] for mix in MIXES]
    judge = ("--kl-divergence-base", base, "--kl-divergence")
    said = {mix: perplexity_tool("-m", files[mix], *judge, until="Same top p:") for mix in MIXES}
    read = compare(base, candidates, [], runtime="llama")
    exact = {runtime: exact_divergence(runtime, original, candidates, LlamaReference(base)) for runtime in ("llama", "torch")}
    rows = []
    for i, mix in enumerate(MIXES):
        ours, theirs = read.candidates[i].divergence, printed(said[mix], "Mean    KLD")
        whole = {runtime: found[i] for runtime, found in exact.items()}
        rows.append(shown({
            "table": "llama divergence", "candidate": mix, "tokens": read.tokens, "theirs": theirs, "ours": ours.mean_kld, **agreement("kld", ours.mean_kld, theirs),
            **{f"exact_{runtime}": value for runtime, value in whole.items()},
            **{f"exact_{runtime}_difference": value - theirs for runtime, value in whole.items()},
        }))  # fmt: skip
        perplexities = {mix: ("Q", ours.perplexity)} | ({"F32": ("base", ours.reference_perplexity)} if i == 0 else {})
        for model, (label, value) in perplexities.items():
            theirs = printed(said[mix], rf"Mean PPL\({label}\)")
            row = {"table": "llama perplexity", "model": model, "tokens": read.tokens, "theirs": theirs, "ours": value}
            rows.append(shown(row | agreement("perplexity", value, theirs)))
    return rows + _windows_task(bench, files, windows)


@fast_float32()
def exact_divergence(runtime: str, original: Path, candidates: list[Path], base: LlamaReference) -> list[float]:
    """Mean divergence of each candidate from whole logits, on the chunks of llama-perplexity's file.

    `compare` cuts the text itself into windows of 511 tokens after the beginning-of-text token, llama-perplexity into chunks
    of 512 whose first it replaces; so the models are run here.
    """
    windows = base.windows(TextEncoder(open_checkpoint(original)).bos)
    half = WINDOW // 2

    def logits(path: Path) -> list[torch.Tensor]:
        checkpoint = open_checkpoint(path)
        with contextlib.closing(LlamaRunner(checkpoint, WINDOW) if runtime == "llama" else TorchRunner(checkpoint)) as runner:
            return [runner.logits(ids)[half:-1] for ids in windows]

    known = [ExactWindow.of(some, ids[half + 1 :]) for some, ids in zip(logits(original), windows, strict=True)]
    out = []
    for path in candidates:
        klds = [window.divergence(some).kld for window, some in zip(known, logits(path), strict=True)]
        out.append(float(np.concatenate(klds).astype(np.float64).mean()))
    return out


def _windows_task(bench: Bench, files: dict[str, Path], windows: int) -> list[Row]:
    """`wikitext_windows_local` in both runtimes against llama-perplexity's final estimate."""
    text, rows = SHARED / "data" / JUDGED[TEXT], []
    kinds = ("F32", *MIXES)
    said = {mix: perplexity_tool("-m", files[mix], "-f", text, "--chunks", str(windows), until=FINAL) for mix in kinds}
    for runtime, chosen in (("llama", kinds), ("torch", ("F32",))):  # torch does not round activations as llama.cpp does
        options = Options(
            tasks=("wikitext_windows_local",), data=SHARED / "data", limit=windows, runtime=runtime, work=bench.folder / "windows"
        )
        report = evaluate_models([files[mix] for mix in chosen], options)
        for mix, model in zip(chosen, report.models, strict=True):
            ours, theirs = model.results["wikitext_windows_local"].scores[0].value, printed(said[mix], FINAL)
            row = {"table": "windows task", "model": mix, "runtime": runtime, "windows": windows, "theirs": theirs, "ours": ours}
            rows.append(shown(row | agreement("windows", ours, theirs)))
    return rows


@dataclass(frozen=True)
class Answer:
    """To one document. content: the beginning of its hash. loglikelihoods: of its choices, nats."""

    content: str
    scores: dict[str, float]
    loglikelihoods: tuple[float, ...]


Answers = dict[tuple[str, int], Answer]  # by task and number of the document


def our_answers(model: ModelScores) -> Answers:
    """Out of quantkit's report."""
    return {
        (name, item.doc): Answer(item.hash, {key: float(value) for key, value in item.scores.items()}, item.loglikelihoods)
        for name, task in model.results.items()
        for item in task.items
    }


def their_answers(results: dict[str, Any]) -> Answers:
    """Out of what lm-eval's ``evaluate`` gives, read without quantkit."""
    out = {}
    for name, samples in results["samples"].items():
        for one in samples:
            scores = {metric: float(one[metric]) for metric in one["metrics"]}
            out[name, one["doc_id"]] = Answer(one["doc_hash"], scores, tuple(choice[0][0] for choice in one["resps"]))
    return out


def ask_quantkit(bench: Bench, task: str, limit: int | None) -> tuple[Answers, float]:
    """Answers of the model type ``quantkit``, and the seconds of asking (the model is loaded before)."""
    options = Options(tasks=(task,), data=SHARED / "data", limit=limit, work=bench.folder / "eval", fresh=True)
    (model,) = evaluate_models([SHARED / "models" / MODELS[0]], options).models
    return our_answers(model), model.seconds


def ask_hf(lm: Any, task: str, limit: int | None) -> tuple[Answers, float]:
    """Answers of lm-eval's own class, and the seconds of asking."""
    from lm_eval import evaluate

    loaded = load_tasks((task,), SHARED / "data")
    for one in loaded["tasks"].values():
        one.set_fewshot_seed(seed=SEED)
    with quietly():
        started = time.perf_counter()
        results: Any = evaluate(lm, loaded, limit=limit, bootstrap_iters=RESAMPLES)
        seconds = time.perf_counter() - started
    return their_answers(results), seconds


def lm_eval(bench: Bench) -> list[Row]:
    """The default tasks one after the other: quantkit's answers and time, then lm-eval's own class in batches of 1 and 16."""
    from lm_eval.models.huggingface import HFLM

    limit, path = (QUICK_DOCUMENTS if bench.quick else None), str(SHARED / "models" / MODELS[0])
    with quietly():
        hf = {size: HFLM(path, dtype="float32", device="cpu", batch_size=size) for size in BATCHES}
    ask_quantkit(bench, "piqa_local", 10)  # warm up
    for lm in hf.values():
        ask_hf(lm, "piqa_local", 10)
    rows, whole = [], 0.0
    for task in DEFAULT:
        started = time.perf_counter()
        ours, seconds = ask_quantkit(bench, task, limit)
        whole += time.perf_counter() - started
        rows.append(shown(_speed(task, "quantkit", len(ours), seconds)))
        for size, lm in hf.items():
            theirs, seconds = ask_hf(lm, task, limit)
            rows.append(shown(_speed(task, f"lm-eval's hf, batches of {size}", len(theirs), seconds)))
            rows.append(shown(_differences(task, size, ours, theirs)))
    reached = whole <= EVAL_LIMIT
    return [
        *rows,
        shown({"table": "tasks in full", "tasks": len(DEFAULT), "seconds": whole, "limit": EVAL_LIMIT, "reached": reached}),
    ]


def _speed(task: str, who: str, documents: int, seconds: float) -> Row:
    return {
        "table": "speed",
        "task": task,
        "who": who,
        "documents": documents,
        "seconds": seconds,
        "per_second": documents / seconds,
    }


def _differences(task: str, batch: int, ours: Answers, theirs: Answers) -> Row:
    """Documents whose score in any metric differs, or that only one side has; largest difference of log-likelihoods, nats."""
    common = [key for key in ours if key in theirs and theirs[key].content.startswith(ours[key].content)]
    differ = len(ours.keys() | theirs.keys()) - sum(ours[key].scores == theirs[key].scores for key in common)
    gaps = [abs(a - b) for key in common for a, b in zip(ours[key].loglikelihoods, theirs[key].loglikelihoods, strict=True)]
    return {
        "table": "answers", "task": task, "batch": batch, "documents": len(theirs), "differ": differ,
        "largest_gap": max(gaps, default=0.0), "limit": 0, "reached": differ == 0 and len(common) > 0,
    }  # fmt: skip


PARTS = {"kept": kept, "llama": llama, "lm-eval": lm_eval, "overhead": overhead, "sanity": sanity}


def record(part: str, rows: list[Row], seconds: float) -> Path:
    """Replace the rows of one part; those of the others stay, with the run that they came from."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": {}}
    facts = environment()
    facts["versions"] |= package_versions("lm-eval")
    runs = {**old["runs"], part: {**facts, "threads": torch.get_num_threads(), "seconds": round(seconds, 1)}}
    ours = [{"part": part, **row} for row in rows]
    every = {name: [row for row in old["rows"] if row["part"] == name] for name in PARTS} | {part: ours}
    return write_results(NAME, "make bench-evaluation", [row for some in every.values() for row in some], runs=runs)


def measured(parts: list[str], quick: bool) -> Iterator[tuple[str, list[Row], float]]:
    """Parts one after the other: name, rows, seconds. Files are shared."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick)
        for part in parts:
            print(f"— {part}", flush=True)
            started = time.perf_counter()
            rows = PARTS[part](bench)
            seconds = time.perf_counter() - started
            print(f"— {part}: {seconds:.0f} s", flush=True)
            yield part, rows, seconds


def main() -> None:
    """The chosen parts; prints rows as they come and writes benchmarks/results/evaluation.json after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a fraction of everything; nothing is written, and overhead is beyond its limit on so few tokens",
    )
    given = parser.parse_args()
    if not SHARED.exists() or not TOOLS.exists():
        raise SystemExit("needs ../shared and the tools of `python tools/build_llama.py`")
    missed: list[Row] = []
    for part, rows, seconds in measured(given.only, given.quick):
        missed += [row for row in rows if not row.get("reached", True)]
        if not given.quick:
            print(f"written: {record(part, rows, seconds)}", flush=True)
    if missed:
        print(f"{len(missed)} limits were missed:")
        for row in missed:
            shown(row)
        sys.exit(1)


if __name__ == "__main__":
    main()
