"""The architectures quantkit knows. A new one is a file here and a line below."""

from __future__ import annotations

from quantkit.checkpoint.families.base import Family, head_dim
from quantkit.checkpoint.families.llama import LLAMA
from quantkit.checkpoint.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from quantkit.errors import CheckpointError

FAMILIES = (LLAMA, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE)


def _known() -> str:
    return ", ".join(name for family in FAMILIES for name in family.hf_classes)


def family_of_hf(architecture: str) -> Family:
    """Family of a class name in config.json. Raises CheckpointError naming the known ones."""
    for family in FAMILIES:
        if architecture in family.hf_classes:
            return family
    raise CheckpointError(f"unknown architecture {architecture!r}", hint=f"quantkit knows {_known()}")


def family_of_gguf(arch: str) -> Family:
    """Family of ``general.architecture``. Raises CheckpointError naming the known ones."""
    for family in FAMILIES:
        if family.arch == arch:
            return family
    raise CheckpointError(f"unknown architecture {arch!r}", hint=f"quantkit knows {', '.join(f.arch for f in FAMILIES)}")


__all__ = ["FAMILIES", "Family", "family_of_gguf", "family_of_hf", "head_dim"]
