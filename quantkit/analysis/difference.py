"""What changed between two models of one architecture: where the weights moved, by how much, and along how many directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.roles import layer_of, role_of
from quantkit.errors import CheckpointError
from quantkit.progress import Progress

SHARE = 0.9  # of the energy, for the rank
EXPERTS = 8  # of a tensor whose rank is taken; energy is of all


@dataclass(frozen=True)
class Moved:
    """One tensor. energy: ‖difference‖² ÷ ‖weights‖². rank: directions that hold nine tenths of the difference's energy (of
    stacked experts the mean of some); full: the most there can be. top: share of the largest direction."""

    tensor: str
    role: str
    layer: int | None
    energy: float
    rank: float
    full: int
    top: float


def differences(before: Checkpoint, after: Checkpoint, progress: Progress | None = None) -> list[Moved]:
    """Every tensor that differs, in the file's order. Raises CheckpointError for models of different shapes."""
    for name in before.tensors.keys() | after.tensors.keys():
        shapes = [c.tensors[name].shape if name in c.tensors else None for c in (before, after)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{name} is {shapes[0] or 'missing'} in {before.path.name} and {shapes[1] or 'missing'} in {after.path.name}",
                hint="only models of one architecture and size can be compared",
            )
    task = (progress or Progress()).task("compare weights", total=before.n_weights, unit="weights")
    found = []
    for name, info in before.tensors.items():
        moved = difference(name, before.read(name), after.read(name))
        found += [moved] if moved is not None else []
        task.advance(info.size)
    task.done()
    return found


def difference(name: str, before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> Moved | None:
    """What moved in a tensor (…, rows, columns), None if nothing did."""
    delta = after.astype(np.float64) - before
    lost = float(np.square(delta).sum())
    if lost == 0:
        return None
    matrices = delta.reshape(-1, *delta.shape[-2:]) if delta.ndim > 1 else delta.reshape(1, 1, -1)
    chosen = [m for m in matrices if m.any()][:EXPERTS]
    spectra = [spectrum(matrix) for matrix in chosen]
    ranks = [int(np.searchsorted(np.cumsum(s), SHARE * s.sum() * (1 - 1e-12))) + 1 for s in spectra]
    return Moved(
        name, role_of(name).value, layer_of(name), lost / max(float(np.square(before, dtype=np.float64).sum()), 1e-300),
        float(np.mean(ranks)), min(matrices.shape[-2:]), float(np.mean([s[0] / s.sum() for s in spectra])),
    )  # fmt: skip


def spectrum(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Energies of a matrix's directions (squared singular values), largest first."""
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return np.maximum(np.linalg.eigvalsh(small)[::-1], 0)
