"""Many calls on several threads, their results in order, a bounded number ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")


def in_order(
    pool: ThreadPoolExecutor, calls: Iterable[tuple[Key, Callable[[], Result]]], ahead: int
) -> Iterator[tuple[Key, Result]]:
    """Yield (key, result) in the order of ``calls``; at most ``ahead`` calls run or wait for the consumer.

    The first exception of a call is raised to the consumer; calls not yet started are cancelled then.
    """
    waiting: deque[tuple[Key, Future[Result]]] = deque()
    try:
        for key, call in calls:
            waiting.append((key, pool.submit(call)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
