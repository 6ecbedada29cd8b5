"""Logits after contexts for lm-eval: a context that several continuations share is read once, in torch and in llama.cpp."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.checkpoint import Checkpoint, HfCheckpoint
from quantkit.checkpoint.files import read_json
from quantkit.errors import QuantkitError
from quantkit.evaluation.runners import open_llama
from quantkit.modeling.packed import packed_model
from quantkit.modeling.products import fast_float32
from quantkit.modeling.skeleton import materialized_model, model_config
from quantkit.modeling.text import TextEncoder

if TYPE_CHECKING:
    import torch

LLAMA_WINDOW = 2048  # llama-cpp-python keeps logits of the whole window: window · vocabulary · 4 bytes


@dataclass(frozen=True)
class Group:
    """context: ids that every tail follows, at least one. tails: ids fed after it; an empty one asks for the next id only."""

    context: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the context with the longest tail."""
        return len(self.context) + max(map(len, self.tails))


class Engine(Protocol):
    """A loaded model. model: what lm-eval's own class for transformers takes for one: it has config and device."""

    model: Any

    def logits(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        """Of each tail of each group, the logits after the context and after each id of the tail: (1 + tail, vocabulary)."""

    def close(self) -> None:
        """Free the model."""


class TorchEngine:
    """transformers' modules. On the CPU weights are decoded once if they fit into half of the memory, else they stay packed."""

    def __init__(
        self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None, packed: bool | None = None
    ) -> None:
        """dtype: of activations and of weights that are not packed, float32 by default. packed: decide it by hand."""
        import torch

        if packed is None:
            packed = device != "cpu" or 4 * checkpoint.n_weights > _memory() // 2
        if packed or dtype not in (None, torch.float32):
            self.model = packed_model(checkpoint, dtype, device)
        else:
            self.model = materialized_model(checkpoint).to(device)
        self.model.generation_config = _generation_config(checkpoint, self.model)

    def logits(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        """See Engine; one pass if no context has two tails, else one for the contexts and one for the tails."""
        import torch

        with torch.inference_mode(), fast_float32():
            if all(len(group.tails) == 1 for group in groups):
                return [[values] for values in self._whole([(group.context, group.tails[0]) for group in groups])]
            if self._slides(groups):
                rows = iter(self._whole([(group.context, tail) for group in groups for tail in group.tails]))
                return [[next(rows) for _ in group.tails] for group in groups]
            return self._shared(groups)

    def close(self) -> None:
        """Free the model."""
        self.model = None

    def _whole(self, rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[torch.Tensor]:
        """Logits after each context and each id of its tail. Padding follows the ids, where no mask is needed."""
        import torch

        hidden = self._hidden(_right_padded([context + tail for context, tail in rows]), use_cache=False)
        spans = [(len(context) - 1, len(context) + len(tail)) for context, tail in rows]
        wanted = torch.cat([states[slice(*span)] for states, span in zip(hidden, spans, strict=True)])
        return list(self.model.lm_head(wanted).split([stop - start for start, stop in spans]))

    def _shared(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        hidden = self._hidden(_right_padded([group.context for group in groups]), past_key_values=cache, use_cache=True)
        lengths = torch.tensor([len(group.context) for group in groups], device=hidden.device)
        first = self.model.lm_head(hidden[torch.arange(len(groups), device=hidden.device), lengths - 1])  # (groups, vocabulary)
        fed = [(number, tail) for number, group in enumerate(groups) for tail in group.tails if tail]
        rest: Iterator[torch.Tensor] = iter(())
        if fed:
            own, ids = torch.tensor([number for number, _ in fed], device=hidden.device), _right_padded([tail for _, tail in fed])
            real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[own, None]  # (tails, longest context)
            cache.batch_select_indices(own)
            states = self._hidden(
                ids, past_key_values=cache, use_cache=True,
                attention_mask=None if real.all() else torch.cat([real, torch.ones_like(ids, dtype=torch.bool)], 1).long(),
                position_ids=lengths[own, None] + torch.arange(ids.shape[1], device=hidden.device),
            )  # fmt: skip
            wanted = torch.cat([row[: len(tail)] for row, (_, tail) in zip(states, fed, strict=True)])
            rest = iter(self.model.lm_head(wanted).split([len(tail) for _, tail in fed]))
        return [
            [torch.cat([first[number, None], next(rest)]) if tail else first[number, None] for tail in group.tails]
            for number, group in enumerate(groups)
        ]

    def _hidden(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """States before the head, (rows, longest, width): logits of every position would be far larger."""
        return self.model.model(input_ids=ids.to(self.model.device), **options).last_hidden_state

    def _slides(self, groups: Sequence[Group]) -> bool:
        """Whether attention sees only so many of the last columns that the padding between context and tail would count."""
        window = getattr(self.model.config, "sliding_window", None)
        longest = max(len(group.context) for group in groups) + max(len(tail) for group in groups for tail in group.tails)
        return window is not None and longest >= window


def _right_padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _memory() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def generation_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """A folder's generation_config.json; nothing for a GGUF. Raises CheckpointError if it is damaged."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    path = folder / "generation_config.json"
    return read_json(path) if isinstance(checkpoint.opened, HfCheckpoint) and path.is_file() else {}


def _generation_config(checkpoint: Checkpoint, model: Any) -> Any:
    """How the model generates, as transformers takes it: what a folder says, else with every token that ends a text."""
    from transformers import GenerationConfig

    if facts := generation_facts(checkpoint):
        return GenerationConfig.from_dict(facts)
    model.generation_config.eos_token_id = TextEncoder(checkpoint).ends or model.generation_config.eos_token_id
    return model.generation_config


@dataclass(frozen=True)
class Facts:
    """What lm-eval asks a model for, where torch does not run it."""

    config: Any
    device: Any
    name_or_path: str


class LlamaEngine:
    """llama.cpp: F32 KV cache, flash attention off, logits of every token; a tail goes on from the context's cache."""

    def __init__(self, checkpoint: Checkpoint, window: int) -> None:
        """window: tokens of context. Raises MissingDependencyError, and CheckpointError if llama.cpp cannot load it."""
        import torch

        self._stack = contextlib.ExitStack()
        self._llama = self._stack.enter_context(open_llama(checkpoint, window, n_ubatch=window, logits_all=True))
        self._ends = TextEncoder(checkpoint).ends
        self.model = Facts(model_config(checkpoint), torch.device("cpu"), str(checkpoint.path))

    def logits(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        """See Engine; one group after the other."""
        return [self._group(group) for group in groups]

    def complete(
        self, ids: list[int], count: int, pick: Callable[[torch.Tensor], int], stopped: Callable[[list[int]], bool]
    ) -> list[int]:
        """At most ``count`` ids after ``ids``, with the one that ends the text, or until ``stopped`` says so of them.

        pick: the next id from logits, float32 (vocabulary,).
        """
        new = list[int]()
        self._feed(ids, 0)
        while len(new) < count:
            new.append(pick(self._rows(self._llama.n_tokens - 1, 1)[0]))
            if new[-1] in self._ends or stopped(new):
                break
            if len(new) < count:
                self._feed(new[-1:], self._llama.n_tokens)
        return new

    def close(self) -> None:
        """Free the model."""
        self._stack.close()

    def _group(self, group: Group) -> list[torch.Tensor]:
        import torch

        known = len(group.context)
        self._feed(group.context, 0)
        first, out = self._rows(known - 1, 1), []
        for tail in group.tails:
            if tail:
                self._feed(tail, known)
            out.append(torch.cat([first, self._rows(known, len(tail))]) if tail else first)
        return out

    def _feed(self, ids: Sequence[int], known: int) -> None:
        """Read ids after the first ``known`` of those that are in the cache; the others are forgotten."""
        self._llama.n_tokens = known
        try:
            self._llama.eval(list(ids))
        except RuntimeError as error:
            raise QuantkitError(f"llama.cpp failed on {len(ids)} tokens ({error})", hint="try a shorter --window") from None

    def _rows(self, start: int, count: int) -> torch.Tensor:
        """Logits of positions, float32 (count, vocabulary): a copy, because llama.cpp's are overwritten."""
        import torch

        return torch.from_numpy(self._llama.scores[start : start + count].copy())
