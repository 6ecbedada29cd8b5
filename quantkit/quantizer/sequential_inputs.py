"""What goes into a layer's linear maps in the original and in the quantized copy, token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.checkpoint.roles import SHARED_ROLES, Role
from quantkit.modeling.blocks import Blocks, Routing

if TYPE_CHECKING:
    import torch

Layer = Callable[["torch.Tensor"], "torch.Tensor"]

ADDED = frozenset(
    {Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN}
)  # what they put out joins the stream after the feed-forward
JOINS = ADDED | {Role.ATTN_O}  # what they put out joins the residual stream
ROUTED = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})


@dataclass(frozen=True)
class Pairs:
    """The same tokens in both copies, in front of one tensor (or one of its experts).

    original, quantized: inputs (tokens, columns). residual: what the tensor's output should make up for,
    (tokens, rows), where it is added to the residual stream.
    """

    name: str
    expert: int
    original: torch.Tensor
    quantized: torch.Tensor
    residual: torch.Tensor | None = None


class _EnoughError(Exception):
    """Everything that was wanted has been seen: the rest of the layer need not run."""


class _Seen:
    """An Observer of one pass of a layer: inputs by tensor and expert, the routing, and the stream between its halves."""

    def __init__(self, wanted: frozenset[str] = frozenset()) -> None:
        """wanted: ends the pass when the inputs of all of these are known; none: it runs to its end."""
        self._wanted = wanted
        self.inputs: dict[tuple[str, int], torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}  # of maps with a single output: the shared expert's gate
        self.routing: Routing | None = None
        self.middle: torch.Tensor | None = None

    def see(self, name: str, expert: int, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        self.inputs[name, expert] = x
        if len(weight) == 1:
            self.outputs[name] = y.reshape(-1)
        if self._wanted and self._wanted <= {name for name, _ in self.inputs}:
            raise _EnoughError

    def route(self, routing: Routing) -> None:
        self.routing = routing

    def pass_middle(self, states: torch.Tensor) -> None:
        self.middle = states.flatten(0, 1)

    def clear(self) -> None:
        self.__init__(self._wanted)  # type: ignore[misc]


class Inputs:
    """Watches a loaded layer of both copies: ``of`` runs a batch through them and gives the pairs of some tensors."""

    def __init__(self, original: Blocks, quantized: Blocks, index: int, wanted: Mapping[str, range]) -> None:
        """wanted: which experts of which tensors of the layer; range(1) for a tensor without experts."""
        self._original, self._index, self._wanted = original, index, wanted
        names = frozenset(wanted)
        self._infos = [original.checkpoint.info(name) for name in sorted(names)]
        gated = any(info.role in ROUTED | SHARED_ROLES for info in self._infos)  # all gates of the layer are needed
        self._theirs, self._ours = (_Seen(frozenset() if gated else names) for _ in range(2))
        self._watch = contextlib.ExitStack()
        for blocks, seen in ((original, self._theirs), (quantized, self._ours)):
            self._watch.enter_context(blocks.watch(index, seen, seen.route, seen.pass_middle))

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.close()

    def of(self, original: Layer, quantized: Layer, x: torch.Tensor, y: torch.Tensor) -> Iterator[Pairs]:
        """Pairs of one batch; x and y are what goes into the layer in both copies."""
        for layer, states in ((original, x), (quantized, y)):
            with contextlib.suppress(_EnoughError):
                layer(states)
        theirs, ours = self._theirs, self._ours
        shared = self._shared_gate()
        routed = [info for info in self._infos if info.role in ROUTED]
        for info in self._infos:
            if info.role in ROUTED:
                continue
            both = theirs.inputs[info.name, 0], ours.inputs[info.name, 0]
            residual = None
            if info.role is Role.ATTN_O:
                residual = (x - y).flatten(0, 1)
            elif info.role in ADDED:
                residual = self._lacking()
                if info.role is Role.SHARED_DOWN and shared is not None:
                    residual = residual * (shared / self._gates())[:, None]
            yield Pairs(info.name, 0, *both, residual)
        if routed:
            yield from self._experts({info.name: info.role for info in routed})
        theirs.clear()
        ours.clear()

    def _experts(self, roles: dict[str, Role]) -> Iterator[Pairs]:
        """Every expert on the tokens that the quantized copy sends to it; the original's expert sees the same ones."""
        theirs, ours = self._theirs.routing, self._ours.routing
        assert theirs is not None and ours is not None
        lacking, gates = self._lacking(), self._gates()
        for expert in range(ours.logits.shape[1]):
            names = {name: role for name, role in roles.items() if expert in self._wanted[name]}
            token, slot = (ours.chosen == expert).nonzero(as_tuple=True)
            if not names or not len(token):
                continue
            seen = _Seen()
            self._original.show_expert(self._index, expert, theirs.x[token], seen)
            for name, role in names.items():
                residual = None
                if role in ADDED:
                    residual = lacking[token] * (ours.weights[token, slot] / gates[token])[:, None]
                yield Pairs(name, expert, seen.inputs[name, expert], self._ours.inputs[name, expert], residual)

    def _lacking(self) -> torch.Tensor:
        """What the stream between attention and feed-forward lacks, (tokens, rows).

        All that share a token's gates make up for it together, each in proportion to its gate: as an output before
        the gate that is gate ÷ ``_gates`` of it.
        """
        assert self._theirs.middle is not None and self._ours.middle is not None
        return self._theirs.middle - self._ours.middle

    def _gates(self) -> torch.Tensor:
        """The squared gates of all that a token passes, added up: (tokens,)."""
        routing, shared = self._ours.routing, self._shared_gate()
        assert routing is not None
        total = routing.weights.square().sum(1)
        return total if shared is None else total + shared.square()

    def _shared_gate(self) -> torch.Tensor | None:
        """With what the quantized copy multiplies the shared expert's output, (tokens,)."""
        for logits in self._ours.outputs.values():
            return logits.sigmoid()
        return None
