"""A weight and its activation statistics in, the bytes of one format out. One file per method."""

from quantkit.encoders.base import Encoder
from quantkit.encoders.ggml import GgmlEncoder
from quantkit.errors import PlanError

ENCODERS: dict[str, Encoder] = {encoder.method: encoder for encoder in (GgmlEncoder(),)}


def get_encoder(method: str) -> Encoder:
    """The encoder of that name. Raises PlanError naming the known ones."""
    if method not in ENCODERS:
        raise PlanError(f"unknown method {method!r}", hint=f"known methods: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[method]


__all__ = ["ENCODERS", "Encoder", "get_encoder"]
