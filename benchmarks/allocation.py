"""Dynamic plans against llama-quantize at equal bytes, and predicted against measured divergence.

    make bench-allocation        # or: python benchmarks/allocation.py [--quick]

Both sides calibrate on the same text; the baseline is llama-quantize with llama-imatrix. The judged texts
(held-out TinyStories, WikiText-2 test) are read here only, after every file is written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from common import SHARED, TOOLS, tool, write_results

from quantkit.analysis.probes import ProbeModel
from quantkit.analysis.probing import decoded
from quantkit.analysis.run import analyze
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.analysis.texts import load_calibration
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.encoders.stats import ActivationStats
from quantkit.evaluation.compare import compare, evaluation_windows
from quantkit.planning.dynamic import dynamic_plan, predicted_cost
from quantkit.planning.plan import Assignment, Plan
from quantkit.planning.policy import Policy
from quantkit.planning.standard import uniform_plan
from quantkit.progress import Progress
from quantkit.quantizer.pipeline import run
from quantkit.quantizer.sequential import sequential

MODELS = ("qk-dense-6m", "qk-moe-11m")
MIXES = {"Q4_K_M": 0.35, "Q3_K_M": 0.28, "Q2_K": 0.28}  # limit of the ratio to the stock mix
CALIBRATION = ("tinystories/stories.txt", "calibration/c4.utf8", "calibration/wiki.utf8")
CALIBRATION_BYTES = 200_000  # of each file
JUDGED = {"TinyStories held out": "tinystories/heldout.txt", "WikiText-2 test": "wikitext2/wiki.test.raw"}
LEFT_OUT = {"code": "calibration/code.utf8", "technical": "calibration/technical.utf8"}  # domains that calibration never sees
LEFT_OUT_CHARACTERS = 150_000  # from their ends: the beginning of the code is part of the package's own mix
JUDGED_TOKENS = 32768
TOKENS = 200_000  # of calibration text
PLANS = 12


def calibration_files(folder: Path) -> list[Path]:
    """The beginning of every calibration text; one more file holds them all, for llama-imatrix."""
    out = []
    for name in CALIBRATION:
        path = folder / name.replace("/", "-")
        text = (SHARED / "data" / name).read_text(encoding="utf-8")[:CALIBRATION_BYTES]
        path.write_text(text, encoding="utf-8")
        out.append(path)
    (folder / "all.txt").write_text("\n".join(path.read_text(encoding="utf-8") for path in out), encoding="utf-8")
    return out


def make_stock(checkpoint: Checkpoint, folder: Path, mixes: Iterable[str] = tuple(MIXES)) -> dict[str, Path]:
    """llama-imatrix and llama-quantize on a BF16 file of the model: one file for each mix."""
    source, imatrix = folder / "bf16.gguf", folder / "stock-imatrix.gguf"
    run(checkpoint, uniform_plan(checkpoint, "BF16", None), source, force=True)
    tool("llama-imatrix", "-m", source, "-f", folder / "all.txt", "-o", imatrix, "-c", "512")
    out = {}
    for mix in mixes:
        out[mix] = folder / f"stock-{mix}.gguf"
        tool("llama-quantize", "--imatrix", imatrix, source, out[mix], mix)
    return out


def make_dynamic(
    checkpoint: Checkpoint, folder: Path, files: list[Path], stock: dict[str, Path], follow: bool = False
) -> tuple[dict[str, Path], dict[str, Plan], Sensitivity, ActivationStats, dict[str, float]]:
    """One analysis, then a plan and a file at the bytes of every stock file. follow: also one of --effort 3, ``MIX sequential``."""
    started = time.perf_counter()
    sensitivity, stats = analyze(checkpoint, folder / "work", calibration=files, tokens=TOKENS)
    seconds = {"analyze": time.perf_counter() - started}
    paths, plans = {}, {}
    text = load_calibration(checkpoint, files, TOKENS)
    for mix, path in stock.items():
        started = time.perf_counter()
        plans[mix] = dynamic_plan(checkpoint, sensitivity, stats, path.stat().st_size, Policy())
        seconds[f"plan at {mix}"] = time.perf_counter() - started
        paths[mix] = folder / f"dynamic-{mix}.gguf"
        started = time.perf_counter()
        run(checkpoint, plans[mix], paths[mix], stats=stats, cache=folder / "work" / "tensors", force=True)
        seconds[f"encode at {mix}"] = time.perf_counter() - started
        if follow:
            started = time.perf_counter()
            found = sequential(checkpoint, plans[mix], stats, text, folder / "work", Progress())
            paths[f"{mix} sequential"] = folder / f"sequential-{mix}.gguf"
            run(checkpoint, plans[mix], paths[f"{mix} sequential"], stats=stats, given=found.given, force=True)
            seconds[f"sequential at {mix}"] = time.perf_counter() - started
    return paths, plans, sensitivity, stats, {k: round(v, 3) for k, v in seconds.items()}


def judged_file(name: str, folder: Path) -> Path:
    """A judged text; of a domain that calibration leaves out, its end."""
    path = SHARED / "data" / name
    if name not in LEFT_OUT.values():
        return path
    end = folder / f"end-{path.name}"
    end.write_text(path.read_text(encoding="utf-8")[-LEFT_OUT_CHARACTERS:], encoding="utf-8")
    return end


def judge(model: Path, stock: dict[str, Path], dynamic: dict[str, Path], plans: dict[str, Plan], quick: bool) -> list[dict]:
    """A row for each mix, text and runtime."""
    rows = []
    for text, name in {**JUDGED, **LEFT_OUT}.items():
        for runtime in ("torch",) if quick or text in LEFT_OUT else ("torch", "llama"):
            both = [path for mix in MIXES for path in (stock[mix], dynamic[mix], dynamic[f"{mix} sequential"])]
            report = compare(model, both, [judged_file(name, both[0].parent)], runtime=runtime, limit=JUDGED_TOKENS)
            for i, mix in enumerate(MIXES):
                a, b, c = report.candidates[3 * i : 3 * i + 3]
                ratio, best = (x.divergence.mean_kld / a.divergence.mean_kld for x in (b, c))
                rows.append({
                    "model": model.name, "text": text, "runtime": runtime, "mix": mix, "tokens": report.tokens,
                    "stock_bytes": a.file_bytes, "dynamic_bytes": b.file_bytes, "stock_kld": a.divergence.mean_kld,
                    "dynamic_kld": b.divergence.mean_kld, "dynamic_kld_error": b.divergence.mean_kld_error, "ratio": ratio,
                    "sequential_kld": c.divergence.mean_kld, "sequential_bytes": c.file_bytes, "sequential_ratio": best,
                    "limit": MIXES[mix], "reached": best <= MIXES[mix], "predicted_kld": plans[mix].predicted_kld,
                    "stock_p999": a.divergence.p999_kld, "dynamic_p999": b.divergence.p999_kld,
                    "sequential_p999": c.divergence.p999_kld, "sequential_perplexity_ratio": c.divergence.perplexity_ratio,
                    "sequential_top1": c.divergence.top1_agreement,
                    "stock_perplexity_ratio": a.divergence.perplexity_ratio, "dynamic_perplexity_ratio": b.divergence.perplexity_ratio,
                    "stock_top1": a.divergence.top1_agreement, "dynamic_top1": b.divergence.top1_agreement,
                })  # fmt: skip
                print(f"{model.name:12} {text:21} {runtime:5} {mix:7} stock {a.divergence.mean_kld:.5f} ({a.file_bytes:,} B) "
                      f"dynamic {b.divergence.mean_kld:.5f} ({b.file_bytes:,} B) ratio {ratio:.3f}, sequential {best:.3f} (limit {MIXES[mix]})", flush=True)  # fmt: skip
    return rows


def varied_plans(checkpoint: Checkpoint, sensitivity: Sensitivity, stats: ActivationStats, size: int, seed: int) -> list[Plan]:
    """PLANS different plans within 0.1 % of ``size``: the best one, and those of ever more distorted costs."""
    rng = np.random.default_rng(seed)
    cost = predicted_cost(sensitivity)
    plans: list[Plan] = []
    attempt = 0
    while len(plans) < PLANS:
        spread = 0.25 * len(plans)
        factor = {name: float(np.exp(spread * rng.standard_normal())) for name in sensitivity.tensors}
        plan = dynamic_plan(checkpoint, sensitivity, stats, size, Policy(), cost=lambda i, f, k=factor: k[i.name] * cost(i, f))
        attempt += 1
        same = any(p.tensors[n].format == plan.tensors[n].format for p in plans for n in p.tensors) and any(
            all(p.tensors[n].format == plan.tensors[n].format for n in p.tensors) for p in plans
        )
        if abs(plan.file_bytes - size) <= 0.001 * size and not same:
            plans.append(plan)
        if attempt > 40 * PLANS:
            raise SystemExit("no 12 different plans at this size")
    return plans


def prediction(checkpoint: Checkpoint, sensitivity: Sensitivity, stats: ActivationStats, sizes: list[int]) -> list[dict]:
    """Predicted and measured divergence of 12 plans at each size, on the judged texts."""
    windows = np.concatenate([evaluation_windows(checkpoint, [SHARED / "data" / name], 512, 4096) for name in JUDGED.values()])
    model = ProbeModel(checkpoint, windows)
    rows = []
    known: dict[tuple[str, str, str], np.ndarray] = {}

    def value(name: str, entry: Assignment) -> np.ndarray:
        key = (name, entry.format, entry.method)
        if key not in known:
            known[key] = decoded(checkpoint, stats, *key)
        return known[key]

    for number, size in enumerate(sizes):
        for plan in varied_plans(checkpoint, sensitivity, stats, size, seed=number):
            values = {n: value(n, plan.tensors[n]) for n in sensitivity.tensors}
            measured = model.divergence(values)
            rows.append(
                {
                    "model": checkpoint.path.name,
                    "size": size,
                    "bytes": plan.file_bytes,
                    "predicted": plan.predicted_kld,
                    "measured": measured,
                }
            )
    return rows


def prediction_summary(rows: list[dict]) -> dict:
    """Rank correlation at each size and the median error over all plans."""
    from scipy.stats import spearmanr

    out: dict = {"spearman": {}}
    for key in dict.fromkeys((r["model"], r["size"]) for r in rows):
        some = [r for r in rows if (r["model"], r["size"]) == key]
        rho = spearmanr([r["predicted"] for r in some], [r["measured"] for r in some]).statistic
        out["spearman"][f"{key[0]} {key[1]:,} B"] = round(float(rho), 4)
    for model in dict.fromkeys(r["model"] for r in rows):
        errors = [abs(np.log2(r["predicted"] / r["measured"])) for r in rows if r["model"] == model]
        out[f"median_abs_log2 {model}"] = round(float(np.median(errors)), 4)
    return out


def main() -> None:
    """All models; prints rows as they come and writes benchmarks/results/allocation.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="torch only, no prediction study, nothing written")
    quick = parser.parse_args().quick
    if not SHARED.exists() or not TOOLS.exists():
        raise SystemExit("needs ../shared and the tools of `python tools/build_llama.py`")
    rows, predicted, seconds = [], [], {}
    for name in MODELS:
        model = SHARED / "models" / name
        checkpoint = open_checkpoint(model)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            files = calibration_files(folder)
            stock = make_stock(checkpoint, folder)
            dynamic, plans, sensitivity, stats, seconds[name] = make_dynamic(checkpoint, folder, files, stock, follow=True)
            rows += judge(model, stock, dynamic, plans, quick)
            if not quick:
                predicted += prediction(checkpoint, sensitivity, stats, [p.stat().st_size for p in stock.values()])
    print(seconds)
    if quick:
        return
    summary = prediction_summary(predicted)
    print(summary)
    path = write_results("allocation", "make bench-allocation", rows, prediction=summary, plans=predicted, seconds=seconds)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
