"""Method ``ggml``: ggml's importance-weighted search, native and on all cores.

The bytes equal those of llama.cpp's C code built without contraction of multiply-adds
(``-ffp-contract=off``); tests hold it against that build.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from quantkit.encoders.base import Encoder, check_finite, check_importance, map_rows
from quantkit.errors import FormatError
from quantkit.formats import Format

_KQUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_IQUANTS = ("IQ3_S", "IQ4_XS")
_LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_FLOATS = ("F32", "F16", "BF16")

Loop = Callable[[np.ndarray, np.ndarray, bool, np.ndarray], None]


@cache
def _loop(name: str) -> Loop:
    """The compiled row loop of a format; Numba is imported here, not before."""
    from quantkit.encoders.jit import announce, prepare_cache

    prepare_cache()
    announce(f"encode_{name.lower()}")
    if name in _KQUANTS:
        from quantkit.encoders import loops_kquants as module
    elif name in _IQUANTS:
        from quantkit.encoders import loops_iquants as module  # type: ignore[no-redef]
    else:
        from quantkit.encoders import loops_legacy as module  # type: ignore[no-redef]
    return getattr(module, f"encode_{name.lower()}")


def _encode_float(x: npt.NDArray[np.float32], fmt: type[Format]) -> npt.NDArray[np.uint8]:
    """F32, F16 and BF16: rounding to nearest, ties to even."""
    if fmt.name == "F32":
        packed = np.ascontiguousarray(x, dtype="<f4")
    elif fmt.name == "F16":
        with np.errstate(over="ignore"):
            packed = x.astype("<f2")
    else:
        bits = np.ascontiguousarray(x).view(np.uint32)
        packed = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return packed.view(np.uint8).reshape(len(x), -1)


def _refuse_overflow(x: npt.NDArray[np.float32], fmt: type[Format], name: str) -> None:
    """Raise FormatError because a half-precision number overflowed: its block would decode to infinity."""
    raise FormatError(
        f"{name} has weights up to {np.abs(x).max():.3g}, too large for {fmt.name}'s half precision",
        hint="the checkpoint is unusual or damaged; --plan uniform:BF16 keeps such weights",
    )


class GgmlEncoder(Encoder):
    """ggml's search for the legacy formats, the K-quants and the float formats."""

    method = "ggml"
    serves = frozenset(_KQUANTS + _IQUANTS + _LEGACY + _FLOATS)

    def encode(self, weight, importance, fmt, *, threads=None, name="tensor", at=(0,)):
        if fmt.name not in self.serves:
            raise FormatError(
                f"{name}: method ggml does not write {fmt.name}", hint="`quantkit formats` lists what can be written"
            )
        x = np.ascontiguousarray(weight, dtype=np.float32)
        row_bytes = fmt.row_bytes(x.shape[1])
        if not fmt.is_quantized():
            check_finite(x, name, at)
            packed = _encode_float(x, fmt)
            if fmt.name == "F16" and not np.isfinite(packed.view("<f2")).all():
                _refuse_overflow(x, fmt, name)
            return packed
        qw = check_importance(importance, x.shape[1], name)
        weighted = qw is not None
        loop = _loop(fmt.name)
        out = np.empty((x.shape[0], row_bytes), np.uint8)
        dummy = np.zeros(1, np.float32) if qw is None else qw
        from quantkit.encoders.loops_scales import all_finite, halves_finite

        bits, fields = x.view(np.uint32), dict(fmt.layout.fields or {})
        halves = [fields[field][1] for field in ("d", "dmin", "m") if field in fields]

        def work(rows: slice) -> None:  # compiled checks, on a chunk that lies in the cache
            if not all_finite(bits[rows]):
                check_finite(x[rows], name, (*at[:-1], at[-1] + rows.start))
            loop(x[rows], dummy, weighted, out[rows])
            if not all(halves_finite(out[rows], offset, fmt.block_bytes()) for offset in halves):
                _refuse_overflow(x[rows], fmt, name)

        map_rows(work, x.shape[0], x.shape[1], threads)
        return out
