"""Every GGUF format against ggml's C code: encode, decode, time to compile. Same weights, same threads, same run.

    make bench-formats           # or: python benchmarks/formats.py [--threads 1] [--only Q4_K …] [--cold]

ggml's C is the runtime build (as users compile it). Its encoder is followed by ggml_validate_row_data as in
llama-quantize, because ours looks for NaN and overflow too. Each figure is the median of several timings.
--cold measures, each format in a process and a cache of its own, what the first use costs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from common import ROOT, write_results

sys.path.insert(0, str(ROOT / "tests"))
import oracle

from quantkit.encoders import get_encoder
from quantkit.formats import Format, formats
from quantkit.formats.compiled import decoder

COLUMNS, ROWS, SLOW_ROWS, REPEATS = 4096, 4096, 256, 5
COLD = """
import time, numpy as np
from quantkit.encoders import get_encoder
from quantkit.encoders.ggml import _loop
from quantkit.formats import get_format
import numba
fmt, x = get_format({name!r}), np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
started = time.perf_counter()
packed = get_encoder("ggml").encode(x, np.ones(256, np.float32), fmt, threads=1)
encoded = time.perf_counter()
from quantkit.formats.compiled import decoder
decoder(fmt)(packed.reshape(-1, fmt.block_bytes()), np.empty((4 * 256 // fmt.elements, fmt.elements), np.float32))
print(encoded - started, time.perf_counter() - encoded)
"""


def timed(function: Callable[[], object]) -> float:
    """Median seconds of a call after one warm-up."""
    function()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


class Bench:
    """Weights, threads and both implementations."""

    def __init__(self, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)
        self.x = (0.02 * rng.standard_t(5, (ROWS, COLUMNS))).astype(np.float32)
        self.importance = rng.gamma(0.5, 2.0, COLUMNS).astype(np.float32)
        self.lib, self.encoder = oracle.library("runtime"), get_encoder("ggml")

    def parts(self, rows: int) -> list[slice]:
        """Rows in as many slices as threads."""
        return [slice(i * rows // self.threads, (i + 1) * rows // self.threads) for i in range(self.threads)]

    def encode(self, fmt: type[Format], importance: np.ndarray | None) -> dict[str, float]:
        """Mweights/s of both encoders."""
        slow = fmt.name.startswith("IQ")
        x = self.x[:SLOW_ROWS] if slow else self.x[: ROWS // 2]

        def theirs(p: slice) -> None:
            packed = oracle.encode(self.lib, fmt.gguf_id, fmt.row_bytes(COLUMNS), x[p], importance)
            self.lib.ggml_validate_row_data(fmt.gguf_id, ctypes.c_void_p(packed.ctypes.data), ctypes.c_size_t(packed.nbytes))

        ours = timed(lambda: self.encoder.encode(x, importance, fmt, threads=self.threads))
        return self.figures(x.size, ours, timed(lambda: list(self.pool.map(theirs, self.parts(len(x))))))

    def decode(self, fmt: type[Format]) -> dict[str, float]:
        """Mweights/s of both decoders."""
        packed = self.encoder.encode(self.x[:SLOW_ROWS], self.importance, fmt)
        packed = np.tile(packed, (ROWS // SLOW_ROWS, 1))
        out = np.empty((ROWS, COLUMNS), np.float32)
        call = getattr(self.lib, f"dequantize_row_{fmt.name.lower().replace('_k', '_K')}")
        call.restype, call.argtypes = None, [ctypes.c_void_p, oracle.FLOAT_P, ctypes.c_int64]
        loop = decoder(fmt)

        def ours(p: slice) -> None:
            loop(packed[p].reshape(-1, fmt.block_bytes()), out[p].reshape(-1, fmt.elements))

        def theirs(p: slice) -> None:
            call(packed[p].ctypes.data, out[p].ctypes.data_as(oracle.FLOAT_P), out[p].size)

        mine, other = (timed(lambda f=f: list(self.pool.map(f, self.parts(ROWS)))) for f in (ours, theirs))
        return self.figures(out.size, mine, other)

    @staticmethod
    def figures(weights: int, ours: float, theirs: float) -> dict[str, float]:
        """Rates and their ratio (above 1: quantkit is faster)."""
        return {"quantkit_mweights_s": round(weights / ours / 1e6, 1), "ggml_mweights_s": round(weights / theirs / 1e6, 1),
                "ratio": round(theirs / ours, 2)}  # fmt: skip


def cold(fmt: type[Format]) -> dict[str, float]:
    """Seconds to compile the encoder and the decoder in a process with an empty cache, Numba's import apart."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "NUMBA_CACHE_DIR": folder}
        run = subprocess.run(
            [sys.executable, "-c", COLD.format(name=fmt.name)], env=env, capture_output=True, text=True, check=True
        )
    encode, decode = map(float, run.stdout.split())
    return {"encode_s": round(encode, 2), "decode_s": round(decode, 2)}


def main() -> None:
    """One row a format and direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of formats")
    parser.add_argument("--cold", action="store_true", help="measure the first use instead")
    args = parser.parse_args()
    chosen = [f for f in formats() if f.is_quantized() and (not args.only or f.name in args.only)]
    rows: list[dict[str, object]] = []
    bench = None if args.cold else Bench(args.threads)
    for fmt in chosen:
        if bench is None:
            rows.append({"format": fmt.name, **cold(fmt)})
        else:
            for kind in ("decode", "encode", "encode with importance"):
                if kind == "encode" and fmt.needs_importance:
                    continue
                qw = bench.importance if kind.endswith("importance") else None
                found = bench.decode(fmt) if kind == "decode" else bench.encode(fmt, qw)
                rows.append({"format": fmt.name, "direction": kind, "threads": args.threads, **found})
                print(
                    "{:8} {:22} quantkit {:8.1f} ggml {:8.1f} Mweights/s  ratio {:.2f}".format(fmt.name, kind, *found.values()),
                    flush=True,
                )
        if bench is None:
            print(rows[-1], flush=True)
    if not args.only:
        name = "formats-cold" if args.cold else f"formats-{args.threads}-threads"
        flags = "--cold" if args.cold else f"--threads {args.threads}"
        print(f"written: {write_results(name, f'python benchmarks/formats.py {flags}', rows)}")


if __name__ == "__main__":
    main()
