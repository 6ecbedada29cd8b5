"""quantkit: find out which weights hurt when they lose bits, spend a byte budget where it matters, prove it.

>>> import quantkit
>>> path, manifest = quantkit.quantize("model/", bpw=3.5)
>>> quantkit.compare("model/", [path]).candidates[0].divergence.mean_kld

The public functions are imported when they are first used. ``quantkit.QuantkitConfig`` makes transformers load quantkit's
files: ``AutoModelForCausalLM.from_pretrained("model.gguf", quantization_config=quantkit.QuantkitConfig())``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api import analyze, compare, load, plan, quantize

__all__ = ["analyze", "compare", "load", "plan", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "QuantkitConfig":  # registers quantkit with transformers
        from quantkit.modeling.plugin_transformers import QuantkitConfig

        return QuantkitConfig
    if name in __all__:
        from quantkit import api

        return getattr(api, name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
