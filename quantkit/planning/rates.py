"""Measures how fast this machine decodes each format: ggml's own product of a matrix and one vector.

The libraries are those of llama-cpp-python, called through ctypes. Weights lie where llama.cpp puts them,
in its repacked layouts too where it has one for the format and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.checkpoint.files import write_text
from quantkit.errors import MissingDependencyError, PlanError, QuantkitError
from quantkit.formats import Format, formats
from quantkit.jit import cache_root
from quantkit.planning.speed import QUIET, Rates
from quantkit.progress import Progress
from quantkit.threads import default_threads
from quantkit.versions import package_versions

SIDE = 4096  # rows and columns of a matrix
SAMPLE_ROWS = 16  # rows that are really encoded; the matrix repeats them
LARGE = 512 << 20  # bytes of weights that no cache holds, if there is memory for them
PART = 64 << 20  # bytes of them that are timed at once
SMALL = 8 << 20  # bytes of weights that the last cache holds
PASSES, SECONDS = 4, 0.1  # all weights are visited at least this often and this long; the fastest visit counts
NODES, WIDTH = 1000, 256  # small nodes in a row, and their width
CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
P, I64, SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_load_all": (None, []),
    "ggml_backend_dev_by_type": (P, [ctypes.c_int]),
    "ggml_backend_dev_init": (P, [P, ctypes.c_char_p]),
    "ggml_backend_dev_backend_reg": (P, [P]),
    "ggml_backend_dev_buffer_type": (P, [P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [P, P]),
    "ggml_backend_reg_get_proc_address": (P, [P, ctypes.c_char_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_tensor_set": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_graph_compute": (ctypes.c_int, [P, P]),
    "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_free": (None, [P]),
    "ggml_tensor_overhead": (SIZE, []),
    "ggml_graph_overhead_custom": (SIZE, [SIZE, ctypes.c_bool]),
    "ggml_free": (None, [P]),
    "ggml_new_tensor_2d": (P, [P, ctypes.c_int, I64, I64]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_rms_norm": (P, [P, P, ctypes.c_float]),
    "ggml_new_graph_custom": (P, [P, SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_quantize_chunk": (SIZE, [ctypes.c_int, P, P, I64, I64, I64, P]),
}


class _InitParams(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


def machine_name() -> str:
    """Processor and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def rates_of_this_machine(threads: int | None = None, progress: Progress | None = None, again: bool = False) -> Rates:
    """The rates kept in the cache folder for this machine, runtime and number of threads; measured if there are none.

    Raises MissingDependencyError if llama-cpp-python is not installed.
    """
    threads = threads or default_threads()
    runtime = f"llama.cpp on the CPU (llama-cpp-python {package_versions('llama-cpp-python').get('llama-cpp-python', '?')})"
    key = hashlib.sha256(f"{machine_name()} {platform.node()} {runtime} {threads}".encode()).hexdigest()[:12]
    path = cache_root() / f"speed-{key}.json"
    if path.exists() and not again:
        try:
            return Rates.read(path)
        except QuantkitError:
            pass  # damaged: measure again
    rates = measure_rates(threads, runtime, progress or Progress())
    if rates.cpu_share >= QUIET:
        write_text(path, rates.to_json())
    return rates


def measure_rates(threads: int, runtime: str, progress: Progress) -> Rates:
    """Weights per second of every GGUF format that the runtime multiplies, and seconds per node of a graph."""
    bench = _Bench(threads)
    found: dict[str, float] = {}
    cached: dict[str, float] = {}
    todo = formats()
    task = progress.task("measure speed", total=len(todo), unit="formats")
    try:
        for fmt in todo:
            for table, nbytes in ((found, bench.large), (cached, SMALL)):
                rate = bench.rate(fmt, nbytes)
                if rate is not None:
                    table[fmt.name] = rate
            task.advance()
        node = bench.seconds_per_node()
    finally:
        bench.close()
        task.done()
    share = float(bench.busy[0] / bench.busy[1]) / threads
    return Rates(found, cached, bench.cache_bytes, node, machine_name(), runtime, threads, min(share, 1.0))


def _library() -> Any:
    """ggml's libraries with the types of the functions used here."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingDependencyError(
            "measuring speed needs llama-cpp-python",
            hint='in the checkout: pip install -e ".[llama]"; or give the speed of each format with --rates FILE',
        ) from None
    except (OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"llama-cpp-python does not load ({error})", hint="install it again, or give --rates FILE"
        ) from None
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
    files = [path for path in sorted(folder.glob("*ggml.*")) if path.suffix in (".so", ".dylib", ".dll")]
    try:
        lib = ctypes.CDLL(str(files[0]))
        for name, (result, arguments) in {
            "ggml_init": (P, [_InitParams]),
            "ggml_log_set": (None, [LOG, P]),
            **SIGNATURES,
        }.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (IndexError, OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"no usable ggml library in {folder} ({error})", hint="give the speed of each format with --rates FILE"
        ) from None
    return lib


def _sysconf(name: str) -> int:
    """A number the system knows, 0 where it does not."""
    try:
        return max(os.sysconf(name), 0)
    except (ValueError, OSError, AttributeError):
        return 0


class _Bench:
    """ggml's CPU backend with a number of threads."""

    def __init__(self, threads: int) -> None:
        self.lib = lib = _library()
        self._silence = LOG(lambda level, text, data: None)
        lib.ggml_log_set(self._silence, None)
        lib.ggml_backend_load_all()
        self.device = lib.ggml_backend_dev_by_type(CPU)
        self.backend = lib.ggml_backend_dev_init(self.device, None)
        self._contexts: list[Any] = []
        self._buffers: list[Any] = []
        registry = lib.ggml_backend_dev_backend_reg(self.device)
        address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, P, ctypes.c_int)(address)(self.backend, threads)
        self._places = [*self._extra_places(registry), lib.ggml_backend_dev_buffer_type(self.device)]
        self.cache_bytes = _sysconf("SC_LEVEL3_CACHE_SIZE") or 2 * SMALL
        self.large = min(LARGE, _sysconf("SC_PAGE_SIZE") * _sysconf("SC_PHYS_PAGES") // 8 or LARGE)
        self.busy = np.zeros(2)  # seconds of the processor, seconds, of all visits

    def _extra_places(self, registry: Any) -> list[Any]:
        """Buffer types in which the backend keeps weights in layouts of its own."""
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        found = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)(self.device)
        out: list[Any] = []
        while found and found[len(out)]:
            out.append(found[len(out)])
        return out

    def rate(self, fmt: type[Format], nbytes: int) -> float | None:
        """Weights per second of one format over about ``nbytes`` of weights, None if the runtime does not multiply it."""
        per_part = max(1, min(nbytes, PART) // (fmt.row_bytes(SIDE) * SIDE))
        parts = max(1, nbytes // PART)
        try:
            for place in self._places:
                graphs = self._products(fmt, per_part, parts, place)
                if graphs:
                    return per_part * SIDE * SIDE / self._fastest(graphs)
                self._release()
            return None
        finally:
            self._release()

    def seconds_per_node(self) -> float:
        """Seconds of a node that computes next to nothing: threads waiting for each other."""
        context = self._context(NODES + 1)
        x = self.lib.ggml_new_tensor_2d(context, 0, WIDTH, 1)
        graph = self.lib.ggml_new_graph_custom(context, NODES + 1, False)
        for _ in range(NODES):
            x = self.lib.ggml_rms_norm(context, x, 1e-5)
        self.lib.ggml_build_forward_expand(graph, x)
        self._place(context, self._places[-1])
        try:
            return self._fastest([graph]) / NODES
        finally:
            self._release()

    def close(self) -> None:
        """Free the backend, and let ggml speak again."""
        self._release()
        self.lib.ggml_backend_free(self.backend)
        self.lib.ggml_log_set(LOG(0), None)

    def _products(self, fmt: type[Format], per_part: int, parts: int, place: Any) -> list[Any]:
        """Graphs of ``per_part`` matrices times one vector with the weights in ``place``; none if that cannot be."""
        lib, count = self.lib, per_part * parts
        weights, work = self._context(count), self._context(count + 1, parts, per_part)
        x = lib.ggml_new_tensor_2d(work, 0, SIDE, 1)
        matrices = [lib.ggml_new_tensor_2d(weights, fmt.gguf_id, SIDE, SIDE) for _ in range(count)]
        products = [lib.ggml_mul_mat(work, matrix, x) for matrix in matrices]
        self._place(weights, place)
        self._place(work, self._places[-1])
        if not lib.ggml_backend_dev_supports_op(self.device, products[0]):
            return []
        data = self._matrix(fmt)
        for matrix in matrices:
            lib.ggml_backend_tensor_set(matrix, data.ctypes.data, 0, data.nbytes)
        vector = np.random.default_rng(1).standard_normal(SIDE).astype(np.float32)
        lib.ggml_backend_tensor_set(x, vector.ctypes.data, 0, vector.nbytes)
        graphs = []
        for part in range(parts):
            graphs.append(lib.ggml_new_graph_custom(work, per_part + 1, False))
            for product in products[part * per_part : (part + 1) * per_part]:
                lib.ggml_build_forward_expand(graphs[-1], product)
        return graphs

    def _matrix(self, fmt: type[Format]) -> np.ndarray:
        """A matrix of normal weights in a format: uint8 (SIDE, bytes of a row)."""
        values = np.random.default_rng(0).standard_normal((SAMPLE_ROWS, SIDE)).astype(np.float32)
        ones, out = np.ones(SIDE, np.float32), np.zeros((SAMPLE_ROWS, fmt.row_bytes(SIDE)), np.uint8)
        self.lib.ggml_quantize_chunk(fmt.gguf_id, values.ctypes.data, out.ctypes.data, 0, SAMPLE_ROWS, SIDE, ones.ctypes.data)
        return np.tile(out, (SIDE // SAMPLE_ROWS, 1))

    def _fastest(self, graphs: list[Any]) -> float:
        """Seconds of the fastest visit to one of several graphs, visited in turn."""
        best, passes, started = float("inf"), 0, time.perf_counter()
        while passes < PASSES or time.perf_counter() - started < SECONDS:
            for graph in graphs:
                begin, busy = time.perf_counter(), time.process_time()
                if self.lib.ggml_backend_graph_compute(self.backend, graph):
                    raise PlanError("llama.cpp could not run the speed measurement", hint="give --rates FILE")
                took = time.perf_counter() - begin
                self.busy += np.array([time.process_time() - busy, took])
                best = min(best, took)
            passes += 1
        return best

    def _context(self, tensors: int, graphs: int = 1, nodes: int | None = None) -> Any:
        graph = self.lib.ggml_graph_overhead_custom((nodes or tensors) + 1, False)
        size = (tensors + 1) * self.lib.ggml_tensor_overhead() + graphs * graph
        self._contexts.append(self.lib.ggml_init(_InitParams(size, None, True)))
        return self._contexts[-1]

    def _place(self, context: Any, place: Any) -> None:
        buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
        if not buffer:
            raise PlanError("not enough memory for the speed measurement", hint="give --rates FILE")
        self._buffers.append(buffer)

    def _release(self) -> None:
        while self._buffers:
            self.lib.ggml_backend_buffer_free(self._buffers.pop())
        while self._contexts:
            self.lib.ggml_free(self._contexts.pop())
