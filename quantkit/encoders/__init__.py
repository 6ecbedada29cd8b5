"""A weight and its activation statistics in, the bytes of one format out. One file per method."""

from quantkit.encoders.base import Encoder
from quantkit.encoders.descent import SearchEncoder, TwoSidedEncoder
from quantkit.encoders.ggml import GgmlEncoder
from quantkit.encoders.ldlq import LdlqEncoder
from quantkit.encoders.nearest import NearestEncoder
from quantkit.errors import FormatError, PlanError
from quantkit.formats import Format

ENCODERS: dict[str, Encoder] = {
    encoder.method: encoder for encoder in (GgmlEncoder(), NearestEncoder(), LdlqEncoder(), SearchEncoder(), TwoSidedEncoder())
}


def get_encoder(method: str) -> Encoder:
    """The encoder of that name. Raises PlanError naming the known ones."""
    if method not in ENCODERS:
        raise PlanError(f"unknown method {method!r}", hint=f"known methods: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[method]


def default_method(fmt: type[Format]) -> str:
    """The first method that writes a format. Raises FormatError if none does."""
    for method, encoder in ENCODERS.items():
        if encoder.writes(fmt):
            return method
    raise FormatError(f"no method writes {fmt.name}", hint="`quantkit formats` lists what can be written")


__all__ = ["ENCODERS", "Encoder", "default_method", "get_encoder"]
