"""Judging for ``quality``: a row for each file, text and judge, the runtime's own floor, the summary, the results file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_results

import quantkit.evaluation.compare as comparison
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.evaluation import breakdown
from quantkit.evaluation.runners import LlamaRunner, Runner, TorchRunner
from quantkit.metrics import Divergence, TokenScores, summarize
from quantkit.progress import Progress

# Limits of the ratio to the stock mix: with everything free, and with head and embedding at the stock mix's types.
LIMITS = {"Q8_0": 1.0, "Q6_K": 1.0, "Q5_K_M": 0.35, "Q4_K_M": 0.35, "Q3_K_M": 0.28, "Q2_K": 0.28, "IQ2_XS": 0.28}
KEPT_LIMITS = {**LIMITS, "Q5_K_M": 0.5, "Q4_K_M": 0.5, "Q3_K_M": 0.42, "Q2_K": 0.42, "IQ2_XS": 0.42}
SLACK = 0.1  # added for models that nobody tuned on
ABLATION, KEPT, STOCK, FLOOR = "ablation", "kept", "stock", "floor"
NAME = "quality"


@dataclass
class Entry:
    """One file of a table, or why there is none. against: the entry that its ratio is taken to."""

    what: str
    part: str
    path: Path | None = None
    reason: str = ""
    against: str = STOCK
    effort: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


Judged = tuple[comparison.Candidate, TokenScores]


@contextlib.contextmanager
def kept_scores() -> Iterator[list[TokenScores]]:
    """The scores of every token of every candidate compared inside, in order; ``compare`` itself keeps only summaries."""
    found: list[TokenScores] = []

    def keep(scores: TokenScores) -> Divergence:
        found.append(scores)
        return summarize(scores)

    comparison.summarize = keep
    try:
        yield found
    finally:
        comparison.summarize = summarize


def compared(model: Path, entries: list[Entry], text: Path, judge: str, tokens: int) -> dict[str, Judged | str]:
    """What one judge says of every file, by name; one that it cannot read has the reason."""
    try:
        with kept_scores() as scores:
            paths = [entry.path for entry in entries if entry.path is not None]
            report = comparison.compare(model, paths, [text], runtime=judge, limit=tokens)
    except QuantkitError as error:
        if len(entries) == 1:
            return {entries[0].what: str(error)}
        return {name: value for entry in entries for name, value in compared(model, [entry], text, judge, tokens).items()}
    return {e.what: both for e, both in zip(entries, zip(report.candidates, scores, strict=True), strict=True)}


def paired_perplexity(ours: TokenScores, theirs: TokenScores) -> tuple[float, float]:
    """Perplexity of ours ÷ theirs and its standard error, from the paired differences of log-likelihoods."""
    difference = theirs.logp.astype(np.float64) - ours.logp.astype(np.float64)
    ratio = float(np.exp(difference.mean()))
    return ratio, float(ratio * difference.std() / np.sqrt(max(len(difference) - 1, 1)))


def row_of(entry: Entry, found: Judged, other: Judged | None) -> dict[str, Any]:
    """The numbers of one file; KL divergence in nats per token, ratios to ``other``."""
    candidate, scores = found
    d = candidate.divergence
    row = {
        "what": entry.what, "part": entry.part, "effort": entry.effort, "bytes": candidate.file_bytes,
        "bpw": round(candidate.bpw, 4), "tokens": d.tokens, "kld": d.mean_kld, "kld_error": d.mean_kld_error, "p999": d.p999_kld,
        "top1": d.top1_agreement, "top1_error": d.top1_error, "perplexity_ratio": d.perplexity_ratio,
        "perplexity_ratio_error": d.perplexity_ratio_error, **entry.facts,
    }  # fmt: skip
    if other is None:
        return row
    base, (change, error) = other[0].divergence, paired_perplexity(scores, other[1])
    return row | {
        "against": entry.against, "ratio": d.mean_kld / max(base.mean_kld, 1e-30), "p999_ratio": d.p999_kld / max(base.p999_kld, 1e-30),
        "top1_gain": d.top1_agreement - base.top1_agreement, "paired_perplexity": change, "paired_perplexity_error": error,
        "perplexity_not_worse": change - 1 <= 2 * error, "fits": candidate.file_bytes <= other[0].file_bytes,
    }  # fmt: skip


def judge_entries(
    model: Path, where: dict[str, Any], entries: list[Entry], texts: dict[str, Path], judges: list[str], tokens: int
) -> list[dict[str, Any]]:
    """A row for each file, text and judge, printed as they come. where: model and mix."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        if entry.path is None:
            rows.append({**where, "what": entry.what, "part": entry.part, "effort": entry.effort, "reason": entry.reason})
            print(line_of(rows[-1]), flush=True)
    files = [entry for entry in entries if entry.path is not None]
    for text, path in texts.items() if files else ():
        for judge in judges:
            found = compared(model, files, path, judge, tokens)
            for entry in files:
                here, mine, other = {**where, "text": text, "judge": judge}, found[entry.what], found.get(entry.against)
                if isinstance(mine, str):
                    rows.append({**here, "what": entry.what, "part": entry.part, "effort": entry.effort, "reason": mine})
                else:
                    rows.append({**here, **row_of(entry, mine, None if isinstance(other, str) else other)})
                print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One printed line of a row."""
    head = f"{row['model']:14} {row['mix']:7} {row.get('text') or '':9} {row.get('judge') or '':5} {row['what']:42}"
    if "reason" in row:
        return f"{head} no numbers: {row['reason']}"
    numbers = f"{row.get('bytes', 0):>11,} B  KLD {row['kld']:.5f} ± {row['kld_error']:.5f}  99.9 % {row['p999']:.4f}  top-1 {row['top1']:.4f}"
    if "ratio" in row:
        worse = "" if row["perplexity_not_worse"] else " worse"
        numbers += f"  ratio {row['ratio']:.3f}  perplexity × {row['paired_perplexity']:.4f} ± {row['paired_perplexity_error']:.4f}{worse}"
    return f"{head} {numbers}"


class FileAsItIs(LlamaRunner):
    """llama.cpp on a BF16 file with its own BF16 products, which comparisons avoid by an F32 copy."""

    def __init__(self, path: Path, window: int) -> None:
        import llama_cpp

        self._stack = contextlib.ExitStack()
        self._model = llama_cpp.Llama(
            str(path), n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True, verbose=False, type_k=0, type_v=0,
            flash_attn=False,
        )  # fmt: skip


def runtime_floor(reference: Runner, candidate: Runner, windows: np.ndarray) -> Divergence:
    """How far two runners of the same weights are apart. windows: token ids, int64 (n, window)."""
    task = Progress().task("floor", total=2 * windows.size, unit="tokens")
    try:
        half = windows.shape[1] // 2
        known = []
        for ids in windows:
            known.append(breakdown.ExactWindow.of(reference.logits(ids)[half:-1], ids[half + 1 :]))
            task.advance(ids.size)
        scores = []
        for kept, ids in zip(known, windows, strict=True):
            scores.append(breakdown.judge(kept, candidate.logits(ids)[half:-1], ids[half + 1 :]).scores)
            task.advance(ids.size)
        return summarize(TokenScores.join(scores))
    finally:
        task.done()
        reference.close()
        candidate.close()


def floor_rows(
    model: Path, where: dict[str, Any], brain: Path | None, stock: Path, texts: dict[str, Path], tokens: int
) -> list[dict[str, Any]]:
    """llama.cpp's own part of the divergence, without any error of weights. where: model and mix.

    brain: a BF16 file of the model, against the same in F32. stock: the mix's file; llama.cpp's products of rounded
    activations against torch's with the same weights in float32.
    """
    original, checkpoint = open_checkpoint(model), open_checkpoint(stock)
    window = min(512, int(original.config.get("max_position_embeddings") or 512))
    rows: list[dict[str, Any]] = []
    for text, path in texts.items():
        windows = comparison.evaluation_windows(original, [path], window, tokens)
        pair = TorchRunner(checkpoint), LlamaRunner(checkpoint, window)
        found = {(where["mix"], "floor: stock weights, llama.cpp and torch"): runtime_floor(*pair, windows)}
        if brain is not None:
            runners = LlamaRunner(original, window), FileAsItIs(brain, window)
            found["BF16", "floor: BF16 file as llama.cpp runs it"] = runtime_floor(*runners, windows)
        for (mix, what), d in found.items():
            row = {
                **where, "mix": mix, "text": text, "judge": "llama", "what": what, "part": FLOOR, "tokens": d.tokens,
                "kld": d.mean_kld, "kld_error": d.mean_kld_error, "p999": d.p999_kld, "top1": d.top1_agreement,
                "perplexity_ratio": d.perplexity_ratio,
            }  # fmt: skip
            rows.append(row)
            print(line_of(row), flush=True)
    return rows


def summary(rows: list[dict[str, Any]], untuned: set[str]) -> list[dict[str, Any]]:
    """For each model, mix, table and effort: the worst ratio over the texts, the limit, and what was reached.

    llama.cpp's rows count where there are some. untuned: models that nobody tuned on.
    """
    out: list[dict[str, Any]] = []
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] in (ABLATION, KEPT) and row.get("effort") and "ldlq" not in row["what"] and "ratio" in row:
            groups.setdefault((row["model"], row["mix"], row["part"], row["effort"]), []).append(row)
    for (model, mix, part, effort), some in groups.items():
        judge = "llama" if any(row["judge"] == "llama" for row in some) else some[0]["judge"]
        some = [row for row in some if row["judge"] == judge]
        worst = max(some, key=lambda row: row["ratio"])
        known = (LIMITS if part == ABLATION else KEPT_LIMITS).get(mix)
        limit = 1.0 if known is None else known + SLACK * (model in untuned)
        line = {
            "model": model, "mix": mix, "table": part, "effort": effort, "judge": judge, "texts": [row["text"] for row in some],
            "runs": sorted({row["run"] for row in some if "run" in row}),
            "ratio": worst["ratio"], "worst_text": worst["text"], "limit": limit, "reached": worst["ratio"] <= limit,
            "fits": all(row["fits"] for row in some), "p999_better": all(row["p999_ratio"] < 1 for row in some),
            "top1_better": all(row["top1_gain"] > 0 for row in some),
            "perplexity_not_worse": all(row["perplexity_not_worse"] for row in some),
        }  # fmt: skip
        floors = [r["kld"] for r in rows if r["part"] == FLOOR and r["model"] == model and r["mix"] == mix]
        out.append(line | ({"kld": max(row["kld"] for row in some), "floor": max(floors)} if floors else {}))
    return out


def print_summary(lines: list[dict[str, Any]]) -> None:
    """The table of limits: reached or not, and what else must hold."""
    print("\nworst ratio to stock over the texts; 99.9 %, top-1: better than stock on every text; perplexity: not worse on any")
    for x in lines:
        words = [f"{key} {'yes' if x[name] else 'NO'}" for key, name in (
            ("bytes", "fits"), ("99.9 %", "p999_better"), ("top-1", "top1_better"), ("perplexity", "perplexity_not_worse"))]  # fmt: skip
        floor = f"  KLD {x['kld']:.6f}, the runtime's floor {x['floor']:.6f}" if "floor" in x else ""
        print(
            f"{x['model']:14} {x['mix']:7} {x['table']:8} effort {x['effort']} {x['judge']:5} ratio {x['ratio']:.3f} ({x['worst_text']}) "
            f"limit {x['limit']:.2f} {'reached' if x['reached'] else 'NOT REACHED'}  {', '.join(words)}{floor}"
        )


def _file_of(row: dict[str, Any]) -> tuple[str, ...]:
    return row["model"], row["mix"], row["what"]


def _stays(row: dict[str, Any], new: list[dict[str, Any]]) -> bool:
    """Whether a row of an earlier run stays. new: rows of the same file: of its text and judge, or a reason, replace it."""
    return not any(
        "text" not in row or "text" not in other or (row["text"], row["judge"]) == (other["text"], other["judge"])
        for other in new
    )


def record(rows: list[dict[str, Any]], run: str, facts: dict[str, Any], untuned: set[str]) -> Path:
    """Write the results: these rows, and of earlier runs what this one did not make. Every row names its run."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": {}}
    new: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        new.setdefault(_file_of(row), []).append(row)
    total = [row for row in old["rows"] if _stays(row, new.get(_file_of(row), []))] + [{**row, "run": run} for row in rows]
    runs = {name: value for name, value in {**old["runs"], run: facts}.items() if any(row["run"] == name for row in total)}
    return write_results(NAME, "make bench-quality", total, runs=runs, summary=summary(total, untuned))
