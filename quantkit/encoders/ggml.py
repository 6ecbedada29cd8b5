"""Method ``ggml``: ggml's importance-weighted search, native and on all cores.

The bytes equal those of llama.cpp's C code built without contraction of multiply-adds
(``-ffp-contract=off``); tests hold it against that build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.encoders.base import Encoder, check_finite, check_importance
from quantkit.errors import CalibrationError, FormatError
from quantkit.formats import Format
from quantkit.kernels.devices import require_device
from quantkit.kernels.encode import ENCODERS as GPU_ENCODERS
from quantkit.threads import map_rows

_MODULES = {
    "loops_kquants": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "loops_legacy": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "loops_lattice": ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    "loops_iq1": ("IQ1_S", "IQ1_M"),
    "loops_iq4": ("IQ4_NL", "IQ4_XS"),
    "loops_few": ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4", "NVFP4"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_FLOATS = ("F32", "F16", "BF16")

_place = ["cpu"]  # where the formats that a GPU encodes are encoded; the last one counts

Loop = Callable[[np.ndarray, np.ndarray, bool, np.ndarray], None]


@cache
def _loop(name: str) -> Loop:
    """The compiled row loop of a format; Numba is imported here, not before."""
    from importlib import import_module

    from quantkit.jit import announce, prepare_cache

    prepare_cache()
    announce(f"encode_{name.lower()}", Path(__file__).with_name(f"{_MODULE_OF[name]}.py"))
    module = import_module(f"quantkit.encoders.{_MODULE_OF[name]}")
    return module.make_encoder(name) if hasattr(module, "make_encoder") else getattr(module, f"encode_{name.lower()}")


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


@contextlib.contextmanager
def encoding_on(device: str) -> Iterator[None]:
    """Encode K-quants, Q8_0 and FP4 by this method on a device of torch meanwhile, to the same bytes.

    Raises FormatError if torch cannot use it.
    """
    require_device(device)
    _place.append(device)
    try:
        yield
    finally:
        _place.pop()


def _encode_there(
    x: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None, fmt: type[Format], name: str
) -> npt.NDArray[np.uint8]:
    """Packed rows from the current device."""
    import torch

    from quantkit.kernels.encode import encode

    weights = None if importance is None else torch.from_numpy(importance).to(_place[-1])
    return encode(torch.from_numpy(x).to(_place[-1]), fmt, weights, name).cpu().numpy()


class GgmlEncoder(Encoder):
    """ggml's own search for every format of a GGUF file."""

    method = "ggml"
    serves = frozenset((*_MODULE_OF, *_FLOATS))

    def encode(self, weight, importance, fmt, *, moments=None, outputs=None, threads=None, name="tensor", at=(0,)):
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
        if qw is None and fmt.needs_importance:
            raise CalibrationError(
                f"{name} cannot become {fmt.name} without activation statistics (ggml refuses that too)",
                hint="run `quantkit analyze` on a text that reaches this tensor, give --imatrix, or choose another format for it",
            )
        weighted = qw is not None
        if _place[-1] != "cpu" and fmt.name in GPU_ENCODERS:
            check_finite(x, name, at)
            return _encode_there(x, qw, fmt, name)
        loop = _loop(fmt.name)
        out = np.empty((x.shape[0], row_bytes), np.uint8)
        dummy = np.zeros(1, np.float32) if qw is None else qw
        from quantkit.encoders.loops_scales import all_finite, halves_finite

        bits = x.view(np.uint32)
        halves = [offset for kind, offset, *_ in (fmt.layout.fields or {}).values() if kind == np.float16]

        def work(rows: slice) -> None:  # compiled checks, on a chunk that lies in the cache
            if not all_finite(bits[rows]):
                check_finite(x[rows], name, (*at[:-1], at[-1] + rows.start))
            loop(x[rows], dummy, weighted, out[rows])
            if not all(halves_finite(out[rows], offset, fmt.block_bytes()) for offset in halves):
                _refuse_overflow(x[rows], fmt, name)

        map_rows(work, x.shape[0], x.shape[1], threads)
        return out
