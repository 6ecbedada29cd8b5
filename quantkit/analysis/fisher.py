"""Fisher information: how much the output distribution cares about each output of each linear map.

With labels sampled from the model itself, E[g gᵀ] of the log-likelihood's gradient g at a linear map's
output is the curvature of the KL divergence there. A small change δy then costs ½·Σ_t (g_t·δy_t)² nats.
We keep the diagonal, per row and per expert. One backward pass, one decoder layer resident; only the
hidden states between layers are kept. Source of the identity: Martens, arXiv 1412.1193, section 5.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.analysis.moments import OutputWriter
from quantkit.checkpoint import Checkpoint
from quantkit.modeling.blocks import Blocks
from quantkit.modeling.skeleton import row_order
from quantkit.progress import Progress

if TYPE_CHECKING:
    import torch

BATCH = 2
MEMORY_BYTES = 1 << 29  # hidden states beyond this are kept on disk
POSITIONS = 256  # positions whose logits are in memory at a time


@dataclass
class Fisher:
    """Mean over all tokens of the squared gradient, by GGUF tensor.

    rows: float64 (experts, rows); tokens an expert never saw count as zero, so traffic is included.
    embedding_ids, embedding: the token ids that occurred, int64 (n,), and the squared gradient at their
    embedding rows, float64 (n, width).
    """

    rows: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    embedding_ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    embedding: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    tokens: int = 0


class _Gradients:
    """An Observer that adds up squared gradients of what comes out of each linear map."""

    def __init__(self, checkpoint: Checkpoint, out: Fisher, full: OutputWriter | None) -> None:
        self._checkpoint, self._out, self._full = checkpoint, out, full

    def see(self, name: str, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        info = self._checkpoint.tensors.get(name)
        if info is None or not y.requires_grad:
            return
        shape = (info.experts, info.rows // info.experts)
        total = self._out.rows.setdefault(name, np.zeros(shape))
        order = np.argsort(row_order(self._checkpoint, name))  # the module's row of each of the tensor's
        same = bool((order == np.arange(len(order))).all())

        def add(gradient: torch.Tensor) -> None:
            flat = gradient.reshape(-1, shape[1])
            flat = flat if same else flat[:, order]
            total[expert] += flat.double().square().sum(0).numpy()
            if self._full is not None:
                self._full.add(name, expert, flat)

        y.register_hook(add)


def measure_fisher(
    checkpoint: Checkpoint, windows: npt.NDArray[np.int64], progress: Progress, seed: int = 0, full: OutputWriter | None = None,
    half: bool = False,
) -> Fisher:  # fmt: skip
    """Diagonal Fisher information at every linear map, from token windows int64 (n, window).

    full: keeps whole matrices E[g gᵀ] of each output as well. half: BF16 matrices multiply in BF16.
    """
    import torch

    out = Fisher(tokens=windows.size)
    observer = _Gradients(checkpoint, out, full)
    blocks = Blocks(checkpoint, half=half)
    batches = [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]
    hidden = HiddenStates(windows.size * blocks.model.config.hidden_size * 4 * (blocks.n_layers + 1))
    hidden.push([blocks.embed(batch) for batch in batches])
    task = progress.task("Fisher information", total=(3 * blocks.n_layers + 3) * windows.size, unit="tokens")
    with torch.no_grad():
        for index in range(blocks.n_layers):
            with blocks.layer(index) as layer:
                hidden.push([_tick(task, layer(states)) for states in hidden.last()])
    gradients = _head_gradients(blocks, observer, hidden.pop(), out, seed)
    for index in reversed(range(blocks.n_layers)):
        inputs = hidden.pop()
        with blocks.layer(index, observer) as layer:
            for i, states in enumerate(inputs):
                states = states.clone().requires_grad_(True)
                with torch.enable_grad():
                    layer(states).backward(gradients[i])
                assert states.grad is not None
                gradients[i] = states.grad
                task.advance(2 * batches[i].size)
        if full is not None:
            full.flush()
    _embedding(checkpoint, batches, gradients, out)
    task.done()
    if full is not None:
        full.close()
    for name in out.rows:
        out.rows[name] /= windows.size
    return out


class HiddenStates:
    """A stack of hidden states, one list of batches for each layer; on disk if they are large."""

    def __init__(self, total_bytes: int) -> None:
        self._stack: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="quantkit-") if total_bytes > MEMORY_BYTES else None

    def push(self, batches: list[torch.Tensor]) -> None:
        """Add the states before the next layer."""
        if self._folder is None:
            self._stack.append(batches)
            return
        paths = []
        for i, batch in enumerate(batches):
            path = Path(self._folder.name) / f"{len(self._stack)}-{i}.npy"
            np.save(path, batch.numpy(), allow_pickle=False)
            paths.append(path)
        self._stack.append(paths)

    def last(self) -> list[torch.Tensor]:
        """The states that were pushed last."""
        import torch

        if self._folder is None:
            return self._stack[-1]
        return [torch.from_numpy(np.load(path, allow_pickle=False)) for path in self._stack[-1]]

    def pop(self) -> list[torch.Tensor]:
        """Take the states that were pushed last."""
        found = self.last()
        paths = self._stack.pop()
        if self._folder is not None:
            for path in paths:
                path.unlink()
        return found


def _tick(task: Any, states: torch.Tensor) -> torch.Tensor:
    task.advance(states.shape[0] * states.shape[1])
    return states


def _head_gradients(
    blocks: Blocks, observer: _Gradients, hidden: list[torch.Tensor], out: Fisher, seed: int
) -> list[torch.Tensor]:
    """Gradients of the sampled labels' log-likelihood at the last hidden states."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    gradients = []
    with blocks.head(observer) as head:
        for states in hidden:
            pieces = []
            for piece in states.reshape(-1, states.shape[-1]).split(POSITIONS):
                leaf = piece.clone().requires_grad_(True)
                with torch.enable_grad():
                    logp = head(leaf).log_softmax(-1)
                    labels = torch.multinomial(logp.detach().exp(), 1, generator=generator)
                    logp.gather(1, labels).sum().backward()
                assert leaf.grad is not None
                pieces.append(leaf.grad)
            gradients.append(torch.cat(pieces).reshape(states.shape))
    return gradients


def _embedding(checkpoint: Checkpoint, batches: list[npt.NDArray[np.int64]], gradients: list[torch.Tensor], out: Fisher) -> None:
    info = checkpoint.info("token_embd.weight")
    out.embedding_ids = np.unique(np.concatenate([batch.reshape(-1) for batch in batches]))
    total = np.zeros((len(out.embedding_ids), info.columns))
    for batch, gradient in zip(batches, gradients, strict=True):
        place = np.searchsorted(out.embedding_ids, batch.reshape(-1))
        np.add.at(total, place, gradient.reshape(-1, info.columns).double().square().numpy())
    out.embedding = total / out.tokens
