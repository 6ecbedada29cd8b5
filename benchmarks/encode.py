"""Encoders against ggml's C code: same weights, same threads, same run.

    make bench-encode            # or: python benchmarks/encode.py [--threads 1]

ggml's C is the runtime build (as users compile it), followed by ggml_validate_row_data as in llama-quantize,
because our figure includes the search for NaN and overflow too. Each figure is the median of several timings.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from common import ROOT, write_results

sys.path.insert(0, str(ROOT / "tests"))
import oracle

from quantkit.encoders import get_encoder
from quantkit.formats import formats

ROWS, COLUMNS, REPEATS = 2048, 4096, 5


def timed(function) -> float:
    """Median seconds of a call after one warm-up."""
    function()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """One row a format, with and without importance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    rng = np.random.default_rng(0)
    x = (0.02 * rng.standard_t(5, (ROWS, COLUMNS))).astype(np.float32)
    importance = rng.gamma(0.5, 2.0, COLUMNS).astype(np.float32)
    encoder, lib = get_encoder("ggml"), oracle.library("runtime")
    started = time.perf_counter()
    for fmt in formats():
        encoder.encode(x[:1], importance, fmt, threads=1)
    first_use = time.perf_counter() - started
    rows = []
    parts = [slice(i * ROWS // threads, (i + 1) * ROWS // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for fmt in (f for f in formats() if f.is_quantized()):
            for qw in (None, importance):
                ours = timed(lambda f=fmt, w=qw: encoder.encode(x, w, f, threads=threads))

                def theirs(f=fmt, w=qw):
                    def work(p):
                        packed = oracle.encode(lib, f.gguf_id, f.row_bytes(COLUMNS), x[p], w)
                        assert lib.ggml_validate_row_data(
                            f.gguf_id, ctypes.c_void_p(packed.ctypes.data), ctypes.c_size_t(packed.nbytes)
                        )

                    list(pool.map(work, parts))

                other = timed(theirs)
                row = {"format": fmt.name, "importance": qw is not None, "threads": threads,
                       "quantkit_mweights_s": round(x.size / ours / 1e6, 1), "ggml_mweights_s": round(x.size / other / 1e6, 1),
                       "ratio": round(other / ours, 2)}  # fmt: skip
                rows.append(row)
                print(f"{fmt.name:5} {'importance' if row['importance'] else 'plain':10} quantkit {row['quantkit_mweights_s']:8.1f} "
                      f"ggml {row['ggml_mweights_s']:8.1f} Mweights/s  ratio {row['ratio']:.2f}", flush=True)  # fmt: skip
    path = write_results(
        f"encode-{threads}-threads",
        f"python benchmarks/encode.py --threads {threads}",
        rows,
        first_use_seconds=round(first_use, 2),
    )
    print(f"first use of all formats (compiling if the cache is empty): {first_use:.1f} s; written: {path}")


if __name__ == "__main__":
    main()
