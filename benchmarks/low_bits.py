"""About 2 bits per weight on a MoE model: dynamic plans with and without I-quants, and llama-quantize's IQ mixes.

    make bench-low-bits          # or: python benchmarks/low_bits.py

All files of a row have at most the same bytes. Everybody calibrates on the same text; llama.cpp judges on
held-out TinyStories and WikiText-2 test, read here only, and writes a greedy sample from each file.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
from pathlib import Path

from allocation import JUDGED, JUDGED_TOKENS, calibration_files, make_stock
from common import SHARED, write_results

from quantkit.analysis.run import analyze
from quantkit.analysis.sensitivity import Sensitivity
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.checkpoint.roles import Role
from quantkit.encoders.stats import ActivationStats
from quantkit.evaluation.compare import compare
from quantkit.formats import get_format
from quantkit.planning.dynamic import dynamic_plan
from quantkit.planning.plan import Plan
from quantkit.planning.policy import Policy
from quantkit.quantizer.pipeline import run

MODEL = "qk-moe-11m"
MIXES = ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M", "Q2_K")
WITHOUT = ("Q*", "TQ*", "MXFP4", "NVFP4")
PROMPT = "Once upon a time there was a little girl named Lily."
SAMPLE_TOKENS = 60


def expert_bits(checkpoint: Checkpoint, plan: Plan) -> dict[str, float]:
    """Mean bits per weight of routed experts and of all other quantized tensors."""
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    routed = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
    for info in checkpoint.tensors.values():
        if info.quantizable:
            kind = "routed experts" if info.role in routed else "all other tensors"
            sums[kind][0] += info.size * get_format(plan.tensors[info.name].format).bpw()
            sums[kind][1] += info.size
    return {kind: round(bits / size, 3) for kind, (bits, size) in sums.items()}


def sample(path: Path) -> str:
    """What a file writes, greedily."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
    text = model(PROMPT, max_tokens=SAMPLE_TOKENS, temperature=0.0)["choices"][0]["text"]
    model.close()
    return str(text)


def make_dynamic(
    checkpoint: Checkpoint, folder: Path, sensitivity: Sensitivity, stats: ActivationStats, mix: str, size: int
) -> dict[str, tuple[Path, Plan]]:
    """Files of a dynamic plan with all formats and of one without I-quants (where that size exists)."""
    made = {}
    for name, patterns in (("dynamic", ()), ("dynamic without I-quants", WITHOUT)):
        plan = dynamic_plan(checkpoint, sensitivity, stats, size, Policy(patterns=patterns))
        path = folder / f"{name.replace(' ', '-')}-{mix}.gguf"
        run(checkpoint, plan, path, stats=stats, cache=folder / "work" / "tensors", force=True)
        made[name] = (path, plan)
    return made


def main() -> None:
    """Rows for each size, text and file; writes benchmarks/results/low_bits.json."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model = SHARED / "models" / MODEL
    checkpoint = open_checkpoint(model)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = calibration_files(folder)
        stock = make_stock(checkpoint, folder, MIXES)
        sensitivity, stats = analyze(checkpoint, folder / "work", calibration=files, tokens=200_000)
        made = {
            mix: {
                "llama-quantize": (path, None),
                **make_dynamic(checkpoint, folder, sensitivity, stats, mix, path.stat().st_size),
            }
            for mix, path in stock.items()
        }
        flat = [(mix, name, path, plan) for mix, some in made.items() for name, (path, plan) in some.items()]
        for text, source in JUDGED.items():
            report = compare(
                model, [path for *_, path, _ in flat], [SHARED / "data" / source], runtime="llama", limit=JUDGED_TOKENS
            )
            for (mix, name, path, plan), candidate in zip(flat, report.candidates, strict=True):
                row = {
                    "model": MODEL, "text": text, "at_the_bytes_of": mix, "file": name, "bytes": candidate.file_bytes, "bpw": round(candidate.bpw, 3),
                    "kld": candidate.divergence.mean_kld, "kld_error": candidate.divergence.mean_kld_error,
                    "perplexity_ratio": candidate.divergence.perplexity_ratio, "top1": candidate.divergence.top1_agreement,
                    "predicted_kld": plan.predicted_kld if plan else None, "bits": expert_bits(checkpoint, plan) if plan else None,
                    "sample": PROMPT + sample(path),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{text:21} {mix:8} {name:25} {row['bytes']:>9,} B {row['bpw']:.3f} bpw KLD {row['kld']:.4f} ± {row['kld_error']:.4f} {row['bits'] or ''}",
                    flush=True,
                )
    print(f"written: {write_results('low_bits', 'make bench-low-bits', rows)}")
    for row in rows[: len(flat)]:
        print(f"\n[{row['at_the_bytes_of']}, {row['file']}] {row['sample']}")


if __name__ == "__main__":
    main()
