"""Which channels of a model can be scaled or put into another order without changing its function.

A group is a set of channels that only a few tensors see: what a norm passes to the linear maps after it, the inner
width of a feed-forward network or of one expert, the values of a head, a rotated pair of query and key. Scaling
what writes a channel by 1/s and what reads it by s changes nothing; nor does giving them a common new order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.families import head_dim
from quantkit.checkpoint.transformed import Change, Transform

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Member:
    """One side of one tensor that sees the channels of a group.

    axis: rows or columns; a vector (norm, bias) has columns only. sign: the exponent of a channel is added (1),
    subtracted (-1) or does not matter (0, only the order does). channel: the channel of each row or column, int32.
    expert: the only expert of a stacked tensor that is meant, None for all.
    """

    name: str
    axis: str
    sign: int
    channel: Ints
    expert: int | None = None

    def places(self) -> Ints:
        """Rows or columns of each channel, int32 (channels, occurrences)."""
        count = int(self.channel.max()) + 1
        return np.argsort(self.channel, kind="stable").astype(np.int32).reshape(count, -1)


@dataclass(frozen=True)
class Group:
    """Channels and those that see them. run: a channel may change places within runs of this length (0: nowhere)."""

    name: str
    channels: int
    members: tuple[Member, ...]
    run: int = 0

    @property
    def readers(self) -> tuple[Member, ...]:
        """Matrices whose columns the channels are: only there do scales change what quantization loses."""
        return tuple(m for m in self.members if m.axis == "columns" and m.sign > 0)

    @property
    def writers(self) -> tuple[Member, ...]:
        """What is scaled the other way: norm weights, rows of matrices, biases."""
        return tuple(m for m in self.members if m.sign < 0)


@dataclass(frozen=True)
class Solution:
    """What a group's channels get. exponents: int32 (channels,), by which columns grow; order: int32 (channels,),
    which channel stands where, or None. The exponents are those of the old channels."""

    group: Group
    exponents: Ints
    order: Ints | None = None

    @property
    def nothing(self) -> bool:
        """Whether it leaves everything as it is."""
        still = self.order is None or bool((self.order == np.arange(self.group.channels)).all())
        return still and not self.exponents.any()


class _Names:
    """Tensors of one layer that a checkpoint has."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self.checkpoint, self.prefix = checkpoint, f"blk.{layer}."

    def has(self, part: str) -> bool:
        """Whether the layer has ``part`` (attn_q.weight)."""
        return f"{self.prefix}{part}" in self.checkpoint.tensors

    def side(self, part: str, axis: str, sign: int, channel: Ints, expert: int | None = None) -> list[Member]:
        """The member for one tensor, none if the layer lacks it."""
        return [Member(f"{self.prefix}{part}", axis, sign, channel, expert)] if self.has(part) else []

    def rows(self, stem: str, sign: int, channel: Ints, expert: int | None = None) -> list[Member]:
        """Rows of a matrix and its bias."""
        return [*self.side(f"{stem}.weight", "rows", sign, channel, expert), *self.side(f"{stem}.bias", "columns", sign, channel)]


def groups_of(checkpoint: Checkpoint) -> list[Group]:
    """All groups of a model, in file order; those of different members never meet on the same side of a tensor."""
    width = np.arange(checkpoint.config["hidden_size"], dtype=np.int32)
    out: list[Group] = []
    if not checkpoint.tied:
        head = (Member("output_norm.weight", "columns", -1, width), Member("output.weight", "columns", 1, width))
        out.append(Group("output_norm", len(width), head))
    for layer in range(checkpoint.n_layers):
        names = _Names(checkpoint, layer)
        out += _norms(names, width)
        out += _attention(names)
        out += _feed_forward(names)
    return [group for group in out if len(group.members) > 1]


def _norms(names: _Names, width: Ints) -> Iterable[Group]:
    attention = ("attn_q", "attn_k", "attn_v")
    inner = ("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_inp_shexp", "ffn_gate_shexp")
    for norm, stems in (("attn_norm", attention), ("ffn_norm", (*inner, "ffn_up_shexp"))):
        members = names.side(f"{norm}.weight", "columns", -1, width)
        for stem in stems:
            members += names.side(f"{stem}.weight", "columns", 1, width)
        yield Group(f"{names.prefix}{norm}", len(width), tuple(members))


def _attention(names: _Names) -> Iterable[Group]:
    config, size = names.checkpoint.config, head_dim(names.checkpoint.config)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    values = np.arange(kv_heads * size, dtype=np.int32)
    shared = np.repeat(values.reshape(kv_heads, 1, size), heads // kv_heads, axis=1).reshape(-1)
    members = [*names.rows("attn_v", -1, values), *names.side("attn_output.weight", "columns", 1, shared)]
    yield Group(f"{names.prefix}attn_v", len(values), tuple(members), run=size)
    if names.has("attn_q_norm.weight"):
        return
    pair = np.arange(size // 2, dtype=np.int32)
    one = np.repeat(pair, 2) if names.checkpoint.family.permutes_qk else np.tile(pair, 2)
    keys = (np.arange(kv_heads, dtype=np.int32)[:, None] * (size // 2) + one).reshape(kv_heads, 1, size)
    queries = np.repeat(keys, heads // kv_heads, axis=1).reshape(-1)
    members = [*names.rows("attn_k", -1, keys.reshape(-1)), *names.rows("attn_q", 1, queries)]
    yield Group(f"{names.prefix}attn_qk", kv_heads * (size // 2), tuple(members))


def _feed_forward(names: _Names) -> Iterable[Group]:
    tensors = names.checkpoint.tensors
    for suffix in ("", "_exps", "_shexp"):
        down = tensors.get(f"{names.prefix}ffn_down{suffix}.weight")
        if down is None:
            continue
        channel = np.arange(down.columns, dtype=np.int32)
        for expert in range(down.experts):
            only = expert if suffix == "_exps" else None
            members = [
                *names.rows(f"ffn_up{suffix}", -1, channel, only),
                *names.rows(f"ffn_gate{suffix}", 0, channel, only),
                *names.side(f"ffn_down{suffix}.weight", "columns", 1, channel, only),
            ]
            name = f"{names.prefix}ffn_up{suffix}" + (f".{expert}" if suffix == "_exps" else "")
            yield Group(name, len(channel), tuple(members), run=len(channel))


def transform_of(checkpoint: Checkpoint, solutions: Iterable[Solution]) -> Transform:
    """The changes of all tensors that the solutions ask for."""
    changes: dict[str, Change] = {}
    for solution in solutions:
        if solution.nothing:
            continue
        order = solution.order
        exponents = solution.exponents if order is None else solution.exponents[order]
        for member in solution.group.members:
            change = changes.get(member.name, Change())
            if member.sign and exponents.any():
                change = _with(checkpoint, change, member, "exponents", member.sign * exponents[member.channel])
            if order is not None:
                change = _with(checkpoint, change, member, "order", moved(member, order))
            changes[member.name] = change
    names = [name for name in checkpoint.tensors if name in changes]
    return Transform(checkpoint.identity, {name: changes[name] for name in names})


def moved(member: Member, order: Ints) -> Ints:
    """The old row or column of each new one, when channel order[j] takes the place of channel j: int32 (length,)."""
    places = member.places()
    out = np.empty(len(member.channel), np.int32)
    out[places] = places[order]
    return out


def _with(checkpoint: Checkpoint, change: Change, member: Member, kind: str, values: Ints) -> Change:
    """``change`` with one more array, for one expert or for all."""
    info = checkpoint.info(member.name)
    part = f"{'row' if member.axis == 'rows' else 'column'}_{kind}"
    known = getattr(change, part)
    if known is None:
        neutral = np.arange(len(values)) if kind == "order" else np.zeros(len(values))
        known = np.tile(neutral.astype(np.int32), (info.experts, 1))
    known = known.copy()
    known[slice(None) if member.expert is None else member.expert] = values
    return replace(change, **{part: known})
