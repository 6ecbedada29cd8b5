"""What running the model quantized would cost: W8A8, W4A8, FP8 and a quantized KV cache, as KL divergence.

All schemes run side by side, block by block, so that one decoder layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.activations import QuantizedCache, fp8, int8
from quantkit.checkpoint import Checkpoint
from quantkit.errors import FormatError
from quantkit.formats.tensors.base import get_tensor_format
from quantkit.metrics import kl_divergence
from quantkit.modeling.blocks import Blocks, change_inputs, linear_weights
from quantkit.progress import Progress

if TYPE_CHECKING:
    import torch

BATCH = 4  # windows that run together


@dataclass(frozen=True)
class Scheme:
    """One way of running. weights: safetensors formats, the first that fits a matrix is used; cache: GGUF format."""

    name: str
    what: str
    weights: tuple[str, ...] = ()
    activations: Callable[[torch.Tensor], torch.Tensor] | None = None
    cache: str | None = None


SCHEMES = (
    Scheme("W8A8", "INT8 weights per channel, INT8 activations per token", ("INT8",), int8),
    Scheme("W4A8", "INT4 weights in groups of 128, INT8 activations per token", ("W4A16", "W4A16_G32"), int8),
    Scheme("FP8", "FP8 E4M3 weights per channel, FP8 activations per token", ("FP8_CHANNEL",), fp8),
    Scheme("A8 per token", "INT8 activations only", (), int8),
    Scheme("A8 per tensor", "INT8 activations only, one scale for all tokens of a batch", (), lambda x: int8(x, "tensor")),
    Scheme(
        "FP8 activations per tensor", "FP8 activations only, one scale for all tokens of a batch", (), lambda x: fp8(x, "tensor")
    ),
    Scheme("KV cache Q8_0", "keys and values in Q8_0", cache="Q8_0"),
    Scheme("KV cache Q4_0", "keys and values in Q4_0", cache="Q4_0"),
)


@dataclass
class SchemeCost:
    """KL divergence of a scheme, nats per token, with the standard error of the mean; None if it cannot be run."""

    name: str
    what: str
    kld: float | None
    kld_error: float | None = None
    why_not: str = ""


def quantized_weight(weight: npt.NDArray[np.float32], names: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """A matrix as it comes back from the first format that fits; unchanged if none does."""
    for name in names:
        fmt = get_tensor_format(name)
        if fmt.fits(weight.shape):
            return fmt.decode(fmt.encode(weight), weight.shape)
    return weight


def measure_schemes(checkpoint: Checkpoint, windows: npt.NDArray[np.int64], progress: Progress) -> list[dict[str, Any]]:
    """KL divergence of every scheme on token windows (n, window), as dictionaries of SchemeCost."""
    import torch

    blocks = Blocks(checkpoint)
    batches = [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]
    failed: dict[str, str] = {}
    task = progress.task("measure activations and cache", total=blocks.n_layers + 1, unit="layers")
    with torch.inference_mode():
        start = [blocks.embed(batch) for batch in batches]
        exact, hidden = list(start), {scheme.name: list(start) for scheme in SCHEMES}
        for index in range(blocks.n_layers):
            with blocks.layer(index) as layer:
                exact = [layer(states) for states in exact]
                for scheme in SCHEMES:
                    if scheme.name not in failed:
                        try:
                            hidden[scheme.name] = _run_layer(blocks, index, layer, scheme, hidden[scheme.name])
                        except FormatError as error:
                            failed[scheme.name] = error.what
            task.advance()
        costs = _divergences(blocks, exact, hidden)
        task.advance()
    task.done()
    out = []
    for scheme in SCHEMES:
        if scheme.name in failed:
            out.append(SchemeCost(scheme.name, scheme.what, None, why_not=failed[scheme.name]))
        else:
            values = costs[scheme.name]
            out.append(
                SchemeCost(scheme.name, scheme.what, float(values.mean()), float(values.std() / max(len(values), 2) ** 0.5))
            )
    return [asdict(cost) for cost in out]


def _run_layer(blocks: Blocks, index: int, layer: Any, scheme: Scheme, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """One decoder layer under a scheme; its weights are as before afterwards."""
    module = blocks.model.model.layers[index]
    originals = []
    if scheme.weights:
        for weight in linear_weights(module):
            originals.append((weight, weight.clone()))
            weight.copy_(weight.new_tensor(quantized_weight(weight.numpy(), scheme.weights)))
    handles = change_inputs(module, scheme.activations) if scheme.activations is not None else []
    try:
        cache = QuantizedCache(scheme.cache) if scheme.cache else None
        return [layer(part, cache) for part in states]
    finally:
        for handle in handles:
            handle.remove()
        for weight, original in originals:
            weight.copy_(original)


def _divergences(
    blocks: Blocks, exact: list[torch.Tensor], hidden: dict[str, list[torch.Tensor]]
) -> dict[str, npt.NDArray[np.float32]]:
    """KL divergence of every token under every scheme; one window's logits are in memory at a time."""
    found: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in hidden}
    with blocks.head() as head:
        for i, batch in enumerate(exact):
            for j in range(len(batch)):
                reference = head(batch[j]).log_softmax(-1)
                for name, states in hidden.items():
                    found[name].append(kl_divergence(reference, head(states[i][j])).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}
