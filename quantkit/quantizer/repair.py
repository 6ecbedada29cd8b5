"""``repair``: a low-rank adapter that makes up for what quantizing took, its bytes spent where they save most.

The error Δ that a quantized matrix leaves costs ½ tr(O Δ I Δᵀ), as in ``two_sided``: I holds the second moments of its
inputs, O those of the gradients at its outputs. In coordinates where both are the identity, the best adapter of rank r
is the r largest singular values of what is missing, and each saves ½ σ² nats. Every singular value of every matrix is
an offer of so many nats for rows + columns half-precision numbers; the best offers are taken until the bytes are
spent. With O = identity this is EoRA (arXiv 2410.21271). Embeddings, routed experts and heads get none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.checkpoint.adapter import Pair, adapter_bytes, write_adapter
from quantkit.checkpoint.roles import Role
from quantkit.encoders.descent import OUTPUT_DAMPING, damped
from quantkit.encoders.ldlq import DAMPING
from quantkit.encoders.stats import ActivationStats, Moments
from quantkit.errors import PlanError
from quantkit.formats import get_format
from quantkit.progress import Progress

LARGEST_RANK = 64  # of one matrix
WHOLE = 1024  # rows or columns up to which all singular values are worked out
LEFT_OUT = frozenset({Role.EMBEDDING, Role.HEAD})

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Offer:
    """What rank after rank of one matrix can save. a: (rank, columns), b: (rows, rank), saved: nats per token, falling."""

    a: Matrix
    b: Matrix
    saved: npt.NDArray[np.float64]

    @property
    def bytes_per_rank(self) -> int:
        """Of both factors in half precision."""
        return 2 * (self.a.shape[1] + len(self.b))


@dataclass(frozen=True)
class Repaired:
    """An adapter that was written. ranks: by tensor. saved: nats per token that it should save, by the same estimate."""

    path: Path
    file_bytes: int
    ranks: dict[str, int]
    saved: float

    @property
    def note(self) -> str:
        """What there is to tell about it, a sentence."""
        return f"adapter {self.path.name}, {self.file_bytes:,} bytes: should save {self.saved:.2g} nats/token"


def offer_of(missing: Matrix, inner: Moments | None, outer: Moments | None) -> Offer:
    """The best adapter of each rank for what a matrix lacks, float32 (rows, columns)."""
    import scipy.linalg

    rows, columns = missing.shape
    into = _roots(inner, columns, DAMPING)
    out = _roots(outer, rows, OUTPUT_DAMPING)
    u, s, vt = _largest(_times(out, _times(into, missing.T.astype(np.float64)).T))
    left, right = u * s, vt
    b = np.concatenate([scipy.linalg.solve_triangular(r, left[part], lower=False) for part, r in out])
    a = np.concatenate([scipy.linalg.solve_triangular(r, right[:, part].T, lower=False).T for part, r in into], axis=1)
    size = np.sqrt(np.maximum(np.abs(b).max(0), 1e-30) / np.maximum(np.abs(a).max(1), 1e-30))  # alike, for half precision
    return Offer((a * size[:, None]).astype(np.float32), (b / size).astype(np.float32), 0.5 * s**2)


def _roots(moments: Moments | None, size: int, damping: float) -> list[tuple[slice, npt.NDArray[np.float64]]]:
    """Upper triangles R with RᵀR = the damped moments, one for each diagonal block; ones where nothing is known."""
    if moments is None:
        return [(slice(0, size), np.eye(size))]
    out, start = [], 0
    for block in moments.read():
        out.append((slice(start, start + len(block)), np.linalg.cholesky(damped(block, damping).astype(np.float64)).T))
        start += len(block)
    return out


def _times(roots: list[tuple[slice, npt.NDArray[np.float64]]], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """R x."""
    return np.concatenate([r @ x[part] for part, r in roots])


def _largest(x: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """The largest singular values and vectors, falling: (rows, k), (k,), (k, columns)."""
    if min(x.shape) <= WHOLE:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return u[:, :LARGEST_RANK], s[:LARGEST_RANK], vt[:LARGEST_RANK]
    from scipy.sparse.linalg import svds

    u, s, vt = svds(x, k=LARGEST_RANK, v0=np.ones(min(x.shape)))
    return u[:, ::-1], s[::-1], vt[::-1]


def choose(offers: dict[str, Offer], architecture: str, size: int) -> dict[str, int]:
    """Ranks by tensor whose adapter saves most within ``size`` bytes of file.

    Offers of one matrix fall, so taking the best one for its bytes each time is right but for the last few bytes.
    """
    ladder = sorted(
        ((saved / offer.bytes_per_rank, name) for name, offer in offers.items() for saved in offer.saved if saved > 0),
        reverse=True,
    )
    order = [name for _, name in ladder]

    def ranks(count: int) -> dict[str, int]:
        out: dict[str, int] = {}
        for name in order[:count]:
            out[name] = out.get(name, 0) + 1
        return {name: out[name] for name in offers if name in out}

    def fits(count: int) -> bool:
        return adapter_bytes(architecture, _shapes(offers, ranks(count))) <= size

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return ranks(low)


def _shapes(offers: dict[str, Offer], ranks: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    return {name: (len(offers[name].b), rank, offers[name].a.shape[1]) for name, rank in ranks.items()}


def repair(
    checkpoint: Checkpoint, quantized: Checkpoint, stats: ActivationStats, size: int, out: Path, progress: Progress | None = None
) -> Repaired:
    """Write an adapter of at most ``size`` bytes for a quantized file of ``checkpoint``.

    stats: of the original's inputs, with full moments. Raises PlanError if not even one rank fits, or the two models
    are not the same.
    """
    infos = [info for info in checkpoint.tensors.values() if _repaired(info, quantized)]
    task = (progress or Progress()).task("repair", total=sum(info.size for info in infos), unit="weights")
    offers = {}
    for info in infos:
        name = info.name
        missing = checkpoint.read(name) - quantized.read(name)
        offers[name] = offer_of(missing, stats.moments_of(name), stats.outputs_of(name, 0, 0, info.rows))
        task.advance(info.size)
    task.done()
    ranks = choose(offers, checkpoint.family.arch, size)
    if not ranks:
        least = adapter_bytes(checkpoint.family.arch, _shapes(offers, dict.fromkeys(list(offers)[:1], 1)))
        raise PlanError(f"an adapter of {size:,} bytes holds not even one rank", hint=f"one takes about {least:,} bytes")
    pairs: dict[str, Pair] = {name: (offers[name].a[:rank], offers[name].b[:, :rank]) for name, rank in ranks.items()}
    write_adapter(out, checkpoint.family.arch, pairs)
    saved = sum(float(offers[name].saved[:rank].sum()) for name, rank in ranks.items())
    return Repaired(out, out.stat().st_size, ranks, saved)


def _repaired(info: TensorInfo, quantized: Checkpoint) -> bool:
    """Whether a tensor can get an adapter. Raises PlanError if the other model has another one."""
    if not info.quantizable or info.experts > 1 or info.role in LEFT_OUT:
        return False
    other = quantized.tensors.get(info.name)
    if other is None or other.shape != info.shape:
        raise PlanError(
            f"{quantized.path.name}: {info.name} is {other.shape if other else 'missing'}, in the original {info.shape}",
            hint="they are not the same model",
        )
    return get_format(other.dtype).is_quantized()
