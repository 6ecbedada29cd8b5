"""How much memory llama.cpp will use: weights, KV cache, output and compute buffers.

The compute buffer is what ggml's graph allocator needs at its peak, so the decoder graph is rebuilt here as
a list of tensor sizes and lifetimes and the allocator's rules are applied to it. Sources: llama.cpp,
src/llama-graph.cpp, src/models/*.cpp, src/llama-kv-cache.cpp, src/llama-context.cpp, ggml/src/ggml-alloc.c.
Numbers are those of a run without repacked weights (``use_extra_bufts = false``) and one sequence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from quantkit.checkpoint import Checkpoint
from quantkit.checkpoint.families import head_dim
from quantkit.errors import PlanError
from quantkit.formats import get_format

ALIGN = 32
BATCH = 2048  # llama.cpp's default n_batch, which bounds the micro-batch
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def pad(n: int, to: int) -> int:
    """n rounded up to a multiple of ``to``."""
    return -(-n // to) * to


@dataclass(frozen=True)
class Run:
    """How the model is going to be run: context and micro-batch in tokens."""

    context: int = 4096
    kv_type: str = "F16"
    micro_batch: int = 512
    flash_attention: bool = True

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise PlanError(f"unknown KV cache type {self.kv_type!r}", hint=f"known: {', '.join(KV_TYPES)}")
        if get_format(self.kv_type).is_quantized() and not self.flash_attention:
            raise PlanError(
                f"a {self.kv_type} KV cache needs flash attention in llama.cpp", hint="leave out --no-flash-attention"
            )

    @property
    def cells(self) -> int:
        """Cells of the KV cache."""
        return pad(self.context, 256)

    @property
    def quantized_cache(self) -> bool:
        """Whether keys and values are stored in blocks."""
        return get_format(self.kv_type).is_quantized()


@dataclass(frozen=True)
class Shape:
    """The hyperparameters that matter for memory."""

    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    ffn: int
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    qkv_bias: bool = False

    @staticmethod
    def of(checkpoint: Checkpoint) -> Shape:
        """Read them from a checkpoint."""
        c = checkpoint.config
        return Shape(
            arch=checkpoint.family.arch, layers=checkpoint.n_layers, width=c["hidden_size"], heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], head=head_dim(c), vocabulary=c["vocab_size"],
            ffn=c.get("intermediate_size") or 0, experts=c.get("num_experts") or 0, used=c.get("num_experts_per_tok") or 0,
            expert_ffn=c.get("moe_intermediate_size") or 0, shared_ffn=c.get("shared_expert_intermediate_size") or 0,
            qkv_bias="blk.0.attn_q.bias" in checkpoint.tensors,
        )  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes by buffer."""

    weights: int
    kv_cache: int
    compute: int
    output: int

    @property
    def total(self) -> int:
        """All buffers together."""
        return self.weights + self.kv_cache + self.compute + self.output


def overhead(checkpoint: Checkpoint, run: Run) -> Memory:
    """Everything but the weights, in bytes."""
    shape = Shape.of(checkpoint)
    return Memory(0, kv_bytes(shape, run), compute_bytes(shape, run), 4 * shape.vocabulary)


def kv_bytes(shape: Shape, run: Run) -> int:
    """Keys and values of every layer."""
    row = get_format(run.kv_type).row_bytes(shape.head * shape.kv_heads)
    return 2 * shape.layers * pad(row * run.cells, ALIGN)


# -- the graph ------------------------------------------------------------------------------------

INPLACE = frozenset({"add", "mul", "div", "unary", "rope", "rms_norm", "clamp", "soft_max"})


class Node:
    """One tensor of the graph: shape, strides in bytes, what it reads, what it is a view of."""

    __slots__ = ("at", "children", "nb", "ne", "op", "output", "owned", "size", "src", "view", "views")

    def __init__(
        self, ne: Iterable[int], op: str, src: Iterable[Node] = (), itemsize: int = 4,
        view: Node | None = None, nb: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        dims = tuple(ne)
        self.ne = dims + (1,) * (4 - len(dims))
        if nb is None:
            steps, step = [], itemsize
            for n in self.ne:
                steps.append(step)
                step *= n
            nb = tuple(steps)
        self.nb = nb
        self.size = prod(self.ne) * itemsize
        self.view: Node | None = (view.view or view) if view is not None else None
        self.op, self.src = op, list(src)
        self.output = self.owned = False
        self.children = self.views = self.at = 0


HELD = Node((1,), "held")  # stands for weights and the KV cache: never allocated here


class Graph:
    """Leaves and nodes in execution order."""

    def __init__(self) -> None:
        self.leaves: list[Node] = []
        self.nodes: list[Node] = []
        self._seen: set[int] = set()

    def add(self, node: Node) -> Node:
        """Append a node after everything it reads, depth first and left to right."""
        if id(node) not in self._seen:
            self._seen.add(id(node))
            for source in node.src:
                self.add(source)
            (self.leaves if node.op == "input" else self.nodes).append(node)
        return node


def _like(op: str, a: Node, *rest: Node) -> Node:
    return Node(a.ne, op, (a, *rest))


def _matmul(rows: int, x: Node) -> Node:
    return Node((rows, *x.ne[1:]), "mul_mat", (x,))


def _view(a: Node, ne: Iterable[int], nb: tuple[int, ...]) -> Node:
    return Node(ne, "view", (a,), a.nb[0], view=a, nb=nb)


def _reshape(a: Node, *ne: int) -> Node:
    return Node(ne, "reshape", (a,), a.nb[0], view=a)


def _heads_last(a: Node) -> Node:
    """The permutation (0, 2, 1, 3) as a view."""
    n, b = a.ne, a.nb
    return _view(a, (n[0], n[2], n[1], n[3]), (b[0], b[2], b[1], b[3]))


class _Builder:
    """Builds the graph that llama.cpp builds for one micro-batch."""

    def __init__(self, shape: Shape, run: Run, tokens: int, outputs: int) -> None:
        self.shape, self.run, self.tokens = shape, run, tokens
        self.graph = Graph()
        gqa = shape.head * shape.kv_heads
        ids = Node((tokens,), "input")
        self.x = self.graph.add(Node((shape.width, tokens), "get_rows", (ids,)))
        self.graph.add(Node((shape.width, tokens), "input"))  # allocated for embeddings as input, never read
        self.position = Node((tokens,), "input")
        self.k_index = Node((tokens,), "input", itemsize=8)
        self.v_index = Node((tokens if run.flash_attention else tokens * gqa,), "input", itemsize=8)
        self.mask = Node((run.cells, tokens), "input", itemsize=2 if run.flash_attention else 4)
        self.out_ids = Node((outputs,), "input")
        rotate = run.quantized_cache and shape.head % 64 == 0
        side = 64
        while rotate and shape.head % (side * 2) == 0:
            side *= 2
        self.k_rotation = Node((side, side), "input") if rotate else None
        self.v_rotation = Node((64, 64), "input") if rotate else None
        self.outputs = outputs

    def build(self) -> Graph:
        """All layers, final norm and head."""
        for layer in range(self.shape.layers):
            self.x = self._layer(self.x, last=layer == self.shape.layers - 1)
        x = self._norm(self.x)
        logits = _matmul(self.shape.vocabulary, x)
        x.output = logits.output = True
        self.graph.add(logits)
        return self.graph

    def _norm(self, a: Node) -> Node:
        return _like("mul", _like("rms_norm", a))

    def _rotate(self, a: Node, rotation: Node | None) -> Node:
        if rotation is None:
            return a
        flat = _reshape(a, rotation.ne[0], prod(a.ne) // rotation.ne[0])
        return _reshape(Node(flat.ne, "mul_mat", (rotation, flat)), *a.ne)

    def _layer(self, x: Node, last: bool) -> Node:
        s, n = self.shape, self.tokens
        a = self._norm(x)
        parts = []
        for heads in (s.heads, s.kv_heads, s.kv_heads):
            y = _matmul(s.head * heads, a)
            y = _like("add", y) if s.qkv_bias else y
            parts.append(_reshape(y, s.head, heads, n))
        q, k, v = parts
        if s.arch in ("qwen3", "qwen3moe"):
            q, k = self._norm(q), self._norm(k)
        a = self._attention(_like("rope", q, self.position), _like("rope", k, self.position), v)
        if last:
            a = Node((s.width, self.outputs), "get_rows", (a, self.out_ids))
            x = Node((s.width, self.outputs), "get_rows", (x, self.out_ids))
        middle = _like("add", a, x)
        a = self._norm(middle)
        y = self._experts(a) if s.experts else self._ffn(a, s.ffn)
        return _like("add", y, middle)

    def _attention(self, q: Node, k: Node, v: Node) -> Node:
        s, n, run = self.shape, self.tokens, self.run
        gqa = s.head * s.kv_heads
        q, k = self._rotate(q, self.k_rotation), self._rotate(k, self.k_rotation)
        v = self._rotate(v, self.v_rotation)
        for node in (q, v, k):
            self.graph.add(node)

        def rows(a: Node) -> Node:
            return _view(a, (gqa, n), (4, a.nb[2], a.nb[2] * n, a.nb[2] * n))

        self.graph.add(Node((gqa, run.cells), "set_rows", (rows(k), self.k_index), view=HELD))
        flat = rows(v) if run.flash_attention else _reshape(_reshape(v, gqa, n), 1, gqa * n)
        self.graph.add(Node((gqa, run.cells), "set_rows", (flat, self.v_index), view=HELD))
        q = _heads_last(_view(q, (s.head, s.heads, n, 1), (q.nb[0], q.nb[1], q.nb[2], q.nb[2] * n)))
        if run.flash_attention:
            casts = [Node((s.head, run.cells, s.kv_heads), "cpy", (), 2) for _ in range(2)] if run.kv_type == "F32" else []
            out = _reshape(Node((s.head, s.heads, n), "flash_attn", (q, *casts, self.mask)), s.head * s.heads, n)
        else:
            scores = _like("soft_max", Node((run.cells, n, s.heads), "mul_mat", (q,)), self.mask)
            mixed = Node((s.head, n, s.heads), "mul_mat", (scores,))
            out = Node((s.head * s.heads, n), "cont", (_heads_last(mixed),))
        self.graph.add(out)
        return _matmul(s.width, self._rotate(out, self.v_rotation))

    def _ffn(self, a: Node, width: int) -> Node:
        up = _matmul(width, a)
        gate = _matmul(width, a)
        return _matmul(self.shape.width, _like("glu", gate, up))

    def _experts(self, a: Node) -> Node:
        s, n = self.shape, a.ne[1]
        probabilities = _like("soft_max", _matmul(s.experts, a))
        order = Node(probabilities.ne, "argsort", (probabilities,))
        picked = _view(order, (s.used, n), (4, order.nb[1], order.nb[2], order.nb[3]))
        w = Node((1, s.used, n), "get_rows", (_reshape(probabilities, 1, s.experts, n), picked))
        if s.arch != "qwen2moe":
            w = _reshape(w, s.used, n)
            total = _like("clamp", Node((1, n), "sum_rows", (w,)))
            w = _reshape(_like("div", w, total), 1, s.used, n)
        self.graph.add(w)
        row = _reshape(a, s.width, 1, n)
        up = Node((s.expert_ffn, s.used, n), "mul_mat_id", (row, picked))
        gate = Node((s.expert_ffn, s.used, n), "mul_mat_id", (row, picked))
        down = Node((s.width, s.used, n), "mul_mat_id", (_like("glu", gate, up), picked))
        y = self.graph.add(_like("mul", down, w))
        parts = [self.graph.add(_view(y, (s.width, n), (4, y.nb[2], y.nb[2] * n, y.nb[2] * n))) for _ in range(s.used)]
        out = parts[0]
        for part in parts[1:]:
            out = self.graph.add(_like("add", out, part))
        if s.used == 1:
            out = Node(out.ne, "cont", (out,))
        if s.arch == "qwen2moe":
            gate_in = _matmul(1, a)
            sigmoid = _like("div", _like("unary", gate_in), gate_in)
            out = _like("add", out, _like("mul", self._ffn(a, s.shared_ffn), sigmoid))
        return out


# -- the allocator --------------------------------------------------------------------------------


class _Pool:
    """Best fit among the free blocks; the open end is used only when nothing else fits."""

    def __init__(self) -> None:
        self.peak = 0
        self._free = [(0, 1 << 62)]

    def take(self, size: int) -> int:
        size = pad(size, ALIGN)
        best = -1
        for i, (_, room) in enumerate(self._free[:-1]):
            if room >= size and (best < 0 or room <= self._free[best][1]):
                best = i
        offset, room = self._free[best]
        if room == size:
            del self._free[best]
        else:
            self._free[best] = (offset + size, room - size)
        self.peak = max(self.peak, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        size = pad(size, ALIGN)
        if not size:
            return
        i = bisect_left(self._free, (offset, 0))
        if i < len(self._free) and offset + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == offset:
            offset, before = self._free.pop(i - 1)
            i, size = i - 1, size + before
        self._free.insert(i, (offset, size))


def peak_bytes(graph: Graph) -> int:
    """Peak of the allocator over a graph in execution order."""
    pool = _Pool()

    def place(node: Node) -> None:
        if node.owned or node.view is not None:
            return
        node.owned = True
        if node.op in INPLACE:
            for parent in node.src:
                alone = parent.owned and not parent.output and parent.children == 1 and not parent.views
                if alone and parent.ne == node.ne and parent.nb == node.nb:
                    node.at, parent.owned = parent.at, False
                    return
        node.at = pool.take(node.size)

    def release(node: Node) -> None:
        if not node.output:
            pool.give(node.at, node.size)
            node.owned = False

    for leaf in graph.leaves:
        place(leaf)
    for node in graph.nodes:
        if node.view is not None:
            node.view.views += 1
        for source in node.src:
            source.children += 1
    for node in graph.nodes:
        place(node)
        for source in node.src:
            source.children -= 1
            if source.children or source.views:
                continue
            root = source.view
            if root is None:
                if source.owned:
                    release(source)
                continue
            root.views -= 1
            if not root.views and not root.children and root.owned:
                release(root)
    return pool.peak


def compute_bytes(shape: Shape, run: Run) -> int:
    """Compute buffer: the larger of the prompt graph and the one-token graph."""
    tokens = min(run.cells, run.context, run.micro_batch, BATCH)
    graphs: list[Any] = [_Builder(shape, run, tokens, tokens), _Builder(shape, run, 1, 1)]
    return max(peak_bytes(builder.build()) for builder in graphs)
