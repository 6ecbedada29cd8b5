"""Products with four-bit weights by other libraries, where they are installed (pip install bitsandbytes torchao).

triton_kernels, whose grouped MXFP4 product is the mark for experts, is not on PyPI: the package of that name there is
another project. Its published time stands in docs/status.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Product = Callable[[torch.Tensor], torch.Tensor]


def bitsandbytes_nf4(weight: torch.Tensor) -> Product:
    """bitsandbytes' NF4 in blocks of 64, maxima in float32. weight: (rows, columns)."""
    import bitsandbytes

    data, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return lambda x: bitsandbytes.matmul_4bit(x, data.t(), quant_state=state)


def torchao_int4(weight: torch.Tensor) -> Product:
    """torchao's INT4 in groups of 128, in the layout of torch's own tensor-core kernel. weight: bfloat16, on a GPU."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return layer


PEERS: dict[str, Callable[[torch.Tensor], Product]] = {"bitsandbytes NF4": bitsandbytes_nf4, "torchao INT4": torchao_int4}


def peers(weight: torch.Tensor) -> dict[str, Product | str]:
    """Library → its product x · Wᵀ, or why there is none."""
    found: dict[str, Product | str] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(weight)
        except Exception as error:  # not installed, no kernel for this GPU, …: the row says so
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found
