"""A weight taken apart into codes, scales and zero points, whatever tensors it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = np.float32


@dataclass(frozen=True)
class Parts:
    """(value[code] − zero) · scale, with scales shared by columns / groups weights of a row.

    element: what a code is: INT4, UINT4 (with zero points), INT8, NF4, FP4, E2M1, E4M3 or E5M2.
    codes: uint8 (rows, columns). values: of every code, float32.
    scale: float32 (rows, groups), numbers of ``scale_type`` (F32, F16 or BF16; E8M0 and E4M3 by ``scale_codes``).
    zero: uint8 (rows, groups), or None.
    scale_codes: uint8 (rows, groups): scale is what they stand for, over ``divisor`` where there is one.
    """

    element: str
    codes: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    scale_type: str
    zero: npt.NDArray[np.uint8] | None = None
    scale_codes: npt.NDArray[np.uint8] | None = None
    divisor: np.float32 | None = None

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def weight(self) -> npt.NDArray[np.float32]:
        """What the parts stand for, float32 (rows, columns)."""
        with np.errstate(all="ignore"):
            out = self.values[self.codes].reshape(*self.scale.shape, -1)
            if self.zero is not None:
                out -= self.zero.astype(F32)[:, :, None]
            out *= self.scale[:, :, None]
        return out.reshape(self.codes.shape)


WHOLE = {
    "INT4": np.arange(-8, 8).astype(F32), "UINT4": np.arange(16).astype(F32), "INT8": np.arange(256, dtype=np.uint8).view(np.int8).astype(F32),
}  # fmt: skip
