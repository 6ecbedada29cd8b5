"""What a GPU can do, and work on the right one."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from quantkit.errors import FormatError

if TYPE_CHECKING:
    import torch

ROOMY = 200_000  # bytes of shared memory that a block may have on the large GPUs: 227 KiB; others have 99 or 163


def require_device(device: str) -> None:
    """Raise FormatError unless ``device`` is the CPU or a GPU that torch and Triton can use."""
    if device == "cpu":
        return
    import torch

    try:
        if torch.device(device).type != "cuda":
            raise RuntimeError("packed weights run on the CPU and on CUDA")
        torch.zeros(1, device=device)
        import triton  # noqa: F401
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise FormatError(
            f"cannot work on {device} ({why})", hint="use --device cpu, or a GPU that torch and Triton can use"
        ) from None


def default_dtype(device: str) -> torch.dtype:
    """The type of activations: float32 on the CPU, on a GPU the half precision that it multiplies fastest."""
    import torch

    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def interpreted() -> bool:
    """Whether Triton's programs run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_host(data: torch.Tensor) -> bool:
    """Whether the CPU's own path computes."""
    return data.device.type == "cpu" and not interpreted()


def capability(data: torch.Tensor) -> int:
    """A GPU's compute capability, 90 for 9.0; of Triton's interpreter, the newest that this knows."""
    import torch

    if data.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(data.device)
    return 10 * major + minor


def is_roomy(data: torch.Tensor) -> bool:
    """Whether a program may take as much shared memory as on an H100."""
    import torch

    if data.device.type != "cuda":
        return True
    facts = torch.cuda.get_device_properties(data.device)
    return getattr(facts, "shared_memory_per_block_optin", 0) >= ROOMY


def multiplies_tiles(x: torch.Tensor) -> bool:
    """Whether Triton multiplies tiles with inputs like these on tensor cores: in half precision, from capability 8.0 on.

    float32 (whose tiles exceed registers and shared memory) and older GPUs decode, and leave products to torch; only few
    tokens are multiplied straight from the packed bytes. In Triton's interpreter every type goes.
    """
    import torch

    return x.device.type != "cuda" or (capability(x) >= 80 and x.dtype in (torch.bfloat16, torch.float16))


def launch(program: Any, grid: tuple[int, ...], data: torch.Tensor, **arguments: Any) -> None:
    """Start a Triton program on the device of ``data``, which need not be the current one."""
    import torch

    with torch.cuda.device(data.device) if data.device.type == "cuda" else contextlib.nullcontext():
        program[grid](**arguments)
