"""What a dynamic file costs in time, against llama-imatrix and llama-quantize on the same text and tokens.

    make bench-cost                                 # --efforts 1 2 --tokens 65536, about half an hour on two cores
    python benchmarks/cost.py --tokens 16384        # less text: fixed costs weigh more

The model is the 1.1 GB Llama with random weights of benchmarks/quantize.py. Every program runs as a process of its own
with warm caches (file and compiled code) and an empty work directory; a cold start, which compiles every loop, is
measured apart on the shipped model. What larger models would take is worked out from the measured pieces, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocation import calibration_files
from common import ROOT, TOOLS, write_results
from quantize import FFN, LAYERS, WIDTH, make_model

MIX = "Q4_K_M"
LIMITS = {1: 2.0, 2: 6.0}
WINDOW = 512
SMALL = ROOT / "examples" / "models" / "qk-dense-6m"
CHILD = """
import json, sys
from quantkit import api
from quantkit.planning.budget import Request
from quantkit.progress import Progress
from quantkit.session import Options
model, out, size, effort, tokens, work, *texts = sys.argv[1:]
progress = Progress()
options = Options(calibration=texts, tokens=int(tokens), effort=int(effort), work=work, progress=progress)
made = api.quantize(model, out, "dynamic", Request(size=size), options=options, force=True)[1]
print(json.dumps({"seconds": progress.seconds, "methods": [entry["method"] for entry in made.tensors.values()]}))
"""


@dataclass(frozen=True)
class Size:
    """What decides how long a model takes: matrices as (rows, columns, how many, share of tokens that pass each)."""

    name: str
    layers: int
    matrices: tuple[tuple[int, int, int, float], ...]

    def products(self) -> float:
        """Multiplications of one token in all layers."""
        return self.layers * sum(r * c * n * share for r, c, n, share in self.matrices)

    def weights(self) -> float:
        """Weights of all layers."""
        return self.layers * sum(r * c * n for r, c, n, _ in self.matrices)

    def moments(self) -> float:
        """Multiplications for x xᵀ of one token: one matrix for each input (q, k, v share one, gate and up too), blocks of at most 4096."""
        inputs = {(c, n, share) for _, c, n, share in self.matrices}
        return self.layers * sum(c * min(c, 4096) * n * share for c, n, share in inputs)

    def pieces(self) -> float:
        """Matrices' worth of measuring: a tensor is measured on 4 pieces, one of experts on 16."""
        return self.layers * sum(4.0 if n > 1 else 1.0 for *_, n, _ in self.matrices)


def dense(name: str, layers: int, width: int, kv: int, ffn: int) -> Size:
    """A Llama."""
    attention = ((width, width, 1, 1.0), (kv, width, 1, 1.0), (kv, width, 1, 1.0), (width, width, 1, 1.0))
    return Size(name, layers, (*attention, (ffn, width, 1, 1.0), (ffn, width, 1, 1.0), (width, ffn, 1, 1.0)))


OURS = dense("synthetic, 0.56B", LAYERS, WIDTH, 512, FFN)
LARGER = (
    dense("8B (Llama 3: 32 layers, 4096 wide, 14336 inside)", 32, 4096, 1024, 14336),
    Size(
        "235B, 22B active (Qwen3 MoE: 94 layers, 4096 wide, 128 experts of 1536, 8 used)", 94,
        ((8192, 4096, 1, 1.0), (512, 4096, 1, 1.0), (512, 4096, 1, 1.0), (4096, 8192, 1, 1.0),
         (1536, 4096, 128, 1 / 16), (1536, 4096, 128, 1 / 16), (4096, 1536, 128, 1 / 16)),
    ),
)  # fmt: skip


def seconds_of(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, str]:
    """(wall seconds, standard output) of a whole process; stops if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout


def ours(
    model: Path, folder: Path, size: int | str, effort: int, tokens: int, texts: list[Path], environment: dict[str, str] | None = None
) -> tuple[float, dict[str, Any]]:  # fmt: skip
    """(wall seconds, what the run says of itself) of one `quantkit quantize --size … --effort …` from nothing."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        arguments = [str(model), str(folder / "ours.gguf"), str(size), str(effort), str(tokens), work, *map(str, texts)]
        seconds, said = seconds_of([sys.executable, "-c", CHILD, *arguments], environment)
    return seconds, json.loads(said.splitlines()[-1])


def cold_start(folder: Path, texts: list[Path], effort: int) -> dict[str, float]:
    """Seconds of a run on the shipped model with nothing compiled, and of the same run right after."""
    with tempfile.TemporaryDirectory() as cache:
        times = [
            ours(SMALL, folder, "4MB", effort, 8192, texts, {"QUANTKIT_CACHE": cache, "NUMBA_CACHE_DIR": cache})[0]
            for _ in range(2)
        ]
    return {"effort": effort, "first_s": round(times[0], 1), "second_s": round(times[1], 1)}


def extrapolate(size: Size, theirs: dict[str, float], pieces: dict[int, dict[str, float]], tokens: int) -> dict[str, Any]:
    """Hours that a larger model would take on the same two cores: every piece grown by what it depends on. Not measured."""
    products, weights = size.products() / OURS.products(), size.weights() / OURS.weights()
    both = (size.products() + size.moments()) / (OURS.products() + OURS.moments())
    stock = theirs["llama-imatrix"] * products + theirs["llama-quantize"] * weights
    row: dict[str, Any] = {"model": size.name, "tokens": tokens, "llama_hours": round(stock / 3600, 2)}
    for effort, found in pieces.items():
        grown = {
            "calibrate": found.get("calibrate", 0.0) * (both if effort > 1 else products),
            "Fisher information": found.get("Fisher information", 0.0) * products,
            "measure formats": found.get("measure formats", 0.0) * size.pieces() / OURS.pieces(),
            "measure activations and cache": found.get("measure activations and cache", 0.0) * products,
            "measure groups and the file": (found.get("measure groups", 0.0) + found.get("measure the file", 0.0)) * products,
            "encode": (found.get("quantize", 0.0) + found["rest"]) * weights,
        }
        total = sum(grown.values())
        row[f"effort_{effort}_hours"] = {name: round(value / 3600, 2) for name, value in grown.items()}
        row[f"effort_{effort}_total_hours"], row[f"effort_{effort}_ratio"] = round(total / 3600, 2), round(total / stock, 2)
    return row


def main() -> None:
    """The cold start, then everything warm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--efforts", type=int, nargs="+", default=[1, 2], choices=(1, 2, 3))
    parser.add_argument("--only-cold", action="store_true", help="only the cold start, which has a results file of its own")
    given = parser.parse_args()
    record_cold(given.efforts)
    if not given.only_cold:
        record_warm(given.efforts, given.tokens)


def record_cold(efforts: list[int]) -> None:
    """The shipped model, with nothing compiled and right after; writes benchmarks/results/cost-cold.json."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = calibration_files(folder)
        rows = [cold_start(folder, texts, effort) for effort in efforts]
    for row in rows:
        print(
            f"effort {row['effort']}: {row['first_s']:.1f} s with nothing compiled, {row['second_s']:.1f} s the second time",
            flush=True,
        )
    write_results("cost-cold", "python benchmarks/cost.py --only-cold", rows, model=SMALL.name, size="4MB", tokens=8192)


def record_warm(efforts: list[int], tokens: int) -> None:
    """Both programs, then every effort, warm; writes benchmarks/results/cost.json."""
    model, _ = make_model()
    threads = str(len(os.sched_getaffinity(0)))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
        folder = Path(temporary)
        texts = calibration_files(folder)
        model.read_bytes()  # into the file cache
        imatrix, stock = folder / "imatrix.gguf", folder / "stock.gguf"
        theirs = {
            "llama-imatrix": seconds_of([str(TOOLS / "llama-imatrix"), "-m", str(model), "-f", str(folder / "all.txt"), "-o", str(imatrix),
                                         "-c", str(WINDOW), "--chunks", str(tokens // WINDOW)])[0],
            "llama-quantize": seconds_of([str(TOOLS / "llama-quantize"), "--imatrix", str(imatrix), str(model), str(stock), MIX, threads])[0],
        }  # fmt: skip
        baseline = sum(theirs.values())
        print(f"llama-imatrix {theirs['llama-imatrix']:.1f} s + llama-quantize {theirs['llama-quantize']:.1f} s", flush=True)
        pieces: dict[int, dict[str, float]] = {}
        for effort in efforts:
            seconds, said = ours(model, folder, stock.stat().st_size, effort, tokens, texts)
            pieces[effort] = {**said["seconds"], "rest": seconds - sum(said["seconds"].values())}
            row = {"effort": effort, "tokens": tokens, "seconds": round(seconds, 1), "llama_s": round(baseline, 1),
                   "ratio": round(seconds / baseline, 2), "limit": LIMITS.get(effort),
                   "pieces": {name: round(value, 1) for name, value in pieces[effort].items()},
                   "methods": {m: said["methods"].count(m) for m in sorted(set(said["methods"]))}}  # fmt: skip
            rows.append(row)
            print(f"effort {effort}: {seconds:.1f} s, {row['ratio']} × (limit {row['limit']}); {row['pieces']}", flush=True)
    larger = [extrapolate(size, theirs, pieces, tokens) for size in LARGER]
    extra = {"llama": {name: round(value, 1) for name, value in theirs.items()}, "on_paper": larger}
    print(json.dumps(extra, indent=1))
    print(f"written: {write_results('cost', 'make bench-cost', rows, **extra)}")


if __name__ == "__main__":
    main()
