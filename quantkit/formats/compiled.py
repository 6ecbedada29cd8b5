"""Fast decoders, compiled from a format's statement of its layout. Numba is imported here, not before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from quantkit.formats.base import Format

Decoder = Callable[[np.ndarray, np.ndarray], None]


@cache
def decoder(fmt: type[Format]) -> Decoder:
    """The compiled decoder of a format: fills out, float32 (blocks, elements), from raw, uint8 (blocks, bytes)."""
    from quantkit.jit import prepare_cache

    prepare_cache()
    from quantkit.formats.loops_decode import make_decoder

    return make_decoder(fmt)
