"""Work on several threads, and one thread for each matrix product while that lasts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK_WEIGHTS = 1 << 18  # weights in one unit of work: large enough to hide the hand-over


def default_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def map_rows(work: Callable[[slice], None], rows: int, columns: int, threads: int | None) -> None:
    """Call ``work`` with slices that together cover ``rows``, on several threads."""
    threads = threads or default_threads()
    step = max(1, CHUNK_WEIGHTS // max(columns, 1))
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if threads == 1 or len(slices) == 1:
        for part in slices:
            work(part)
        return
    list(_pool(threads).map(work, slices))


def map_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> list[Result]:
    """``work`` of every item, in order, on several threads of their own (what they call may use ``map_rows``)."""
    todo = list(items)
    count = min(threads or default_threads(), len(todo))
    if count < 2:
        return [work(item) for item in todo]
    with ThreadPoolExecutor(count, thread_name_prefix="quantkit-work") as pool, lone_products(count):
        return list(pool.map(work, todo))


_lock = Lock()
_limits: list[Any] = []  # one entry for each lone_products that is open; the first holds what to restore


@contextlib.contextmanager
def lone_products(threads: int) -> Iterator[None]:
    """NumPy's and SciPy's products on one thread each, because several of ours make them at the same time.

    Otherwise the threads of their library wait for each other busily, which took three times as long on two cores.
    """
    if threads < 2:
        yield
        return
    with _lock:
        _limits.append(_library().limit(limits=1) if not _limits else _limits[0])
    try:
        yield
    finally:
        with _lock:
            limit = _limits.pop()
            if not _limits:
                limit.restore_original_limits()


@cache
def _library() -> Any:
    import scipy.linalg  # noqa: F401  has a library of its own, which is found only once it is loaded
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay, because starting them costs as much as encoding a few million weights."""
    return ThreadPoolExecutor(threads, thread_name_prefix="quantkit-encode")
