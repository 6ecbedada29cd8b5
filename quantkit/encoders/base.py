"""The interface of an encoder, and what all of them share: checks and threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from quantkit.encoders.stats import Moments
from quantkit.errors import CalibrationError, FormatError
from quantkit.formats import Format

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK_WEIGHTS = 1 << 18  # weights in one unit of work: large enough to hide the hand-over


class Encoder:
    """A method that turns a weight and its activation statistics into the bytes of one format."""

    method: ClassVar[str] = ""
    version: ClassVar[int] = 1  # raised when the bytes for the same input change
    serves: ClassVar[frozenset[str]] = frozenset()
    needs_moments: ClassVar[bool] = False  # full second moments of the inputs, not only their diagonal
    uses_outputs: ClassVar[bool] = False  # moments of the gradients at the outputs: blocks of rows are encoded together

    def writes(self, fmt: type[Format]) -> bool:
        """Whether the method can write the format."""
        return fmt.name in self.serves

    def encode(
        self,
        weight: npt.NDArray[np.float32],
        importance: npt.NDArray[np.float32] | None,
        fmt: type[Format],
        *,
        moments: Moments | None = None,
        outputs: Moments | None = None,
        threads: int | None = None,
        name: str = "tensor",
        at: tuple[int, ...] = (0,),
    ) -> npt.NDArray[np.uint8]:
        """Encode a matrix row by row.

        weight: float32 (rows, columns). importance: float32 (columns,), the mean square of each input
        channel (an imatrix row), or None for the format's unweighted search. moments: E[x xᵀ] of the inputs,
        outputs: E[g gᵀ] of the gradients at these rows, blocks that together cover them, for methods that use them. Returns uint8 (rows, bytes per row). ``name`` and ``at``, the index of the first row, are used in error messages.

        Raises FormatError if the format is not served, the row does not fit or a weight is not finite;
        CalibrationError if the importance has another length or is not finite.
        """
        raise NotImplementedError


def check_finite(x: npt.NDArray[np.float32], name: str, at: tuple[int, ...] = (0,)) -> None:
    """Refuse NaN and infinity, naming the first index. One would poison its whole block.

    at: index of the first row of x within the tensor, as (row,) or (expert, row).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(x.sum()):  # NaN and infinity survive a sum; an overflow only costs a closer look
            return
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        where = ", ".join(map(str, [*at[:-1], at[-1] + row, column]))
        raise FormatError(
            f"{name}[{where}] is {x[tuple(bad[0])]} ({len(bad)} weights are not finite)",
            hint="the checkpoint is damaged or overflowed; download it again or repair the tensor",
        )


def check_importance(importance: npt.NDArray[np.float32] | None, columns: int, name: str) -> npt.NDArray[np.float32] | None:
    """The importance as contiguous float32 of the right length, or None."""
    if importance is None:
        return None
    qw = np.ascontiguousarray(importance, dtype=np.float32).reshape(-1)
    if qw.size != columns:
        raise CalibrationError(
            f"{name} has rows of {columns} weights but its importance has {qw.size} values",
            hint="the calibration belongs to another model; run `quantkit analyze` on this one",
        )
    if not np.isfinite(qw).all() or (qw < 0).any():
        bad = int(np.argwhere(~(np.isfinite(qw) & (qw >= 0)))[0, 0])
        raise CalibrationError(f"importance of {name}, column {bad}, is {qw[bad]}", hint="run `quantkit analyze` again")
    return qw


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
    with ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="quantkit-work") as pool:
        return list(pool.map(work, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay, because starting them costs as much as encoding a few million weights."""
    return ThreadPoolExecutor(threads, thread_name_prefix="quantkit-encode")
