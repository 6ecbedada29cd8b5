"""The interface of an encoder, and the checks that all of them share."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantkit.encoders.stats import Moments
from quantkit.errors import CalibrationError, FormatError
from quantkit.formats import Format


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
