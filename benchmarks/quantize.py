"""Wall time and peak memory of `quantkit quantize` against llama-quantize, on the same BF16 file of over 1 GB.

    make bench-quantize          # or: python benchmarks/quantize.py [--runs 3]

The model is a Llama with random weights, made once. Both are timed as whole processes, alternately, on all
cores, with warm caches (file and compiled code); the tensors of both outputs are compared byte by byte
where the C build does not contract multiply-adds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import ROOT, TOOLS, build_llama, write_results

from quantkit.analysis.imatrix import write_imatrix
from quantkit.checkpoint import gguf_values as gv
from quantkit.checkpoint import open_checkpoint
from quantkit.checkpoint.gguf_writer import TensorSpec, write_gguf
from quantkit.encoders import get_encoder
from quantkit.encoders.stats import ActivationStats, TensorStats
from quantkit.formats import get_format

WIDTH, FFN, LAYERS, VOCABULARY = 2048, 5632, 12, 4096
MIXES = ("Q4_K_M", "Q8_0")
FOLDER = build_llama.cache_dir().parent / "synthetic-llama-0.6b"


def make_model() -> tuple[Path, Path]:
    """A BF16 GGUF of 0.6 billion random weights and an imatrix for it, in the cache folder."""
    model, imatrix = FOLDER / "model-bf16.gguf", FOLDER / "imatrix.gguf"
    if imatrix.exists():
        return model, imatrix
    FOLDER.mkdir(parents=True, exist_ok=True)
    donor = open_checkpoint(ROOT / "examples" / "models" / "qk-dense-6m").metadata()
    metadata = {"general.architecture": gv.string("llama"), "general.name": gv.string("synthetic")}
    for key, value in {"block_count": LAYERS, "context_length": 2048, "embedding_length": WIDTH, "feed_forward_length": FFN,
                       "attention.head_count": 32, "attention.head_count_kv": 8, "vocab_size": VOCABULARY}.items():  # fmt: skip
        metadata[f"llama.{key}"] = gv.u32(value)
    metadata["llama.attention.layer_norm_rms_epsilon"] = gv.f32(1e-5)
    metadata |= {key: value for key, value in donor.items() if key.startswith("tokenizer.")}
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        for name, shape in {"attn_q": (WIDTH, WIDTH), "attn_k": (512, WIDTH), "attn_v": (512, WIDTH), "attn_output": (WIDTH, WIDTH),
                            "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN),
                            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}.items():  # fmt: skip
            shapes[f"blk.{i}.{name}"] = shape
    specs = [TensorSpec(f"{n}.weight", s, get_format("BF16" if len(s) > 1 else "F32")) for n, s in shapes.items()]
    rng = np.random.default_rng(0)
    stats = ActivationStats(datasets=("synthetic",), chunks=1)
    with write_gguf(model, metadata, specs) as writer:
        for spec in specs:
            rows = np.atleast_2d(
                np.ones(spec.shape, np.float32) if len(spec.shape) == 1 else 0.02 * rng.standard_normal(spec.shape, np.float32)
            )
            writer.write(spec.name, get_encoder("ggml").encode(rows, None, spec.format))
            if spec.name.startswith("blk.") and len(spec.shape) > 1:
                stats.tensors[spec.name] = TensorStats(
                    rng.gamma(0.5, 2.0, (1, spec.shape[1])).astype(np.float32), np.ones(1, np.float32)
                )
    write_imatrix(imatrix, stats)
    return model, imatrix


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident GiB) of a whole process; stops if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command[0]} failed: {process.stderr.read().decode()[-1000:] if process.stderr else ''}")
    return seconds, usage.ru_maxrss / 2**20


def main() -> None:
    """Alternating runs of both programs for each mix, with and without importance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    model, imatrix = make_model()
    quantkit = str(Path(sys.executable).parent / "quantkit")
    rows = []
    for mix in MIXES:
        for weighted in (False, True):
            ours_out, theirs_out = FOLDER / "ours.gguf", FOLDER / "theirs.gguf"
            ours = [quantkit, "quantize", str(model), mix, "-o", str(ours_out), "--force", "--work", str(FOLDER / "work")]
            theirs = [str(TOOLS / "llama-quantize")] + (["--imatrix", str(imatrix)] if weighted else [])
            theirs += [str(model), str(theirs_out), mix, str(len(os.sched_getaffinity(0)))]
            ours += ["--imatrix", str(imatrix)] if weighted else ["--no-imatrix"]
            timings: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
            for run in range(runs + 1):  # the first run of each warms the caches
                for name, command in (("ours", ours), ("theirs", theirs)):
                    subprocess.run(["rm", "-rf", str(FOLDER / "work")], check=True)
                    measured = measure(command)
                    if run:
                        timings[name].append(measured)
            a, b = (statistics.median(t[0] for t in timings[name]) for name in ("ours", "theirs"))
            peak = max(t[1] for t in timings["ours"])
            rows.append({"mix": mix, "importance": weighted, "file_bytes": model.stat().st_size, "quantkit_s": round(a, 2), "llama_quantize_s": round(b, 2),
                         "ratio": round(a / b, 3), "limit": 1.1, "quantkit_peak_gib": round(peak, 3), "peak_limit_gib": 2.5,
                         "llama_quantize_peak_gib": round(max(t[1] for t in timings["theirs"]), 3)})  # fmt: skip
            print(f"{mix} {'importance' if weighted else 'plain':10}: quantkit {a:6.2f} s, peak {peak:.2f} GiB; llama-quantize {b:6.2f} s; "
                  f"ratio {a / b:.2f} (limit 1.1)", flush=True)  # fmt: skip
    print(f"written: {write_results('quantize', 'make bench-quantize', rows)}")
    for name in ("ours.gguf", "theirs.gguf", "ours.gguf.manifest.json"):
        (FOLDER / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
