"""Safetensors formats in words: their tensors, and what a multiplier costs."""

from __future__ import annotations

from quantkit.formats.tensors.base import TensorFormat

# element → (exponent, mantissa) bits of the number that is multiplied; look-up values are multiplied as bfloat16.
NUMBERS = {
    "nf4": (8, 7),
    "fp4": (8, 7),
    "int4": (0, 3),
    "uint4": (0, 4),
    "int8": (0, 7),
    "e2m1": (2, 1),
    "e4m3": (4, 3),
    "e5m2": (5, 2),
}
SAMPLE = (4096, 4096)


def multiplier_cost(fmt: type[TensorFormat]) -> int:
    """Exponent bits + mantissa bits² of the number that is multiplied (see quantkit.formats.describe)."""
    exponent, mantissa = NUMBERS[fmt.element]
    return exponent + mantissa**2


def draw(fmt: type[TensorFormat]) -> str:
    """The tensors of a 4096 × 4096 weight: name, type, shape and share of the bytes."""
    total = fmt.nbytes(SAMPLE)
    lines = [
        f"{fmt.name} (safetensors), {fmt.bpw(SAMPLE):.4f} bits per weight of a 4096 × 4096 weight",
        (fmt.__doc__ or "").strip(),
        "",
    ]
    for name, tensor in fmt.layout(SAMPLE).items():
        shape = " × ".join(map(str, tensor.shape))
        lines.append(f"{name:40} {tensor.dtype:8} {shape:16} {tensor.nbytes():>10,} B  {100 * tensor.nbytes() / total:5.2f} %")
    return "\n".join([*lines, "", f"source: {fmt.source}"])
