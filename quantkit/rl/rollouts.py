"""Where completions come from: engines that draw them and say how likely each token was.

The log-probabilities are those of softmax(logits / temperature), before anything is cut off by top-k, top-p or min-p:
what the trainer computes for the same tokens. Their difference is the mismatch of engine and trainer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.errors import AdapterError

if TYPE_CHECKING:
    from quantkit.rl.base import Base
    from quantkit.rl.options import GrpoOptions


BATCH = 64  # completions that transformers draws together


@dataclass(frozen=True)
class Sampling:
    """count: tokens at most. top_k 0, top_p 1 and min_p 0 cut nothing off. ends: tokens that end a completion.

    seed, step, turn: what the random numbers depend on, besides the place of the prompt: a run that goes on draws what
    it would have drawn.
    """

    count: int
    temperature: float
    ends: list[int]
    pad: int
    seed: int = 0
    step: int = 0
    turn: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def stream(self, place: int) -> int:
        """Seed of the random numbers of a prompt's completion."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {self.step} {self.turn} {place}".encode()).digest()[:7])


@dataclass(frozen=True)
class Completions:
    """ids: with the token that ended it, if one did; log_probabilities: of each of them, in nats."""

    ids: list[list[int]]
    log_probabilities: list[list[float]]


class Engine(Protocol):
    """Draws completions with the weights that the trainer has now."""

    def complete(self, model: Any, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """One completion for each prompt (token ids). model: the trainer's, base and adapter."""

    def close(self) -> None:
        """Free what it holds."""


class TorchEngine:
    """transformers' ``generate`` on the trainer's own model: one copy of the base, and always the newest adapter.

    batch: prompts that run together; halved when memory runs out, with the same random numbers for each prompt.
    cache: of transformers, for example ``static``.
    """

    def __init__(self, batch: int = BATCH, cache: str | None = None) -> None:
        self._batch, self._cache = batch, cache

    def complete(self, model: Any, prompts: list[list[int]], sampling: Sampling) -> Completions:
        import torch

        ids: list[list[int]] = []
        scores: list[list[float]] = []
        while len(ids) < len(prompts):
            places = range(len(ids), min(len(ids) + self._batch, len(prompts)))
            draws = [torch.Generator().manual_seed(sampling.stream(place)) for place in places]
            try:
                found = self._part(model, [prompts[place] for place in places], draws, sampling)
            except torch.OutOfMemoryError:
                if self._batch == 1:
                    raise
                self._batch //= 2
                torch.cuda.empty_cache()
                continue
            ids += found.ids
            scores += found.log_probabilities
        return Completions(ids, scores)

    def close(self) -> None:
        """It holds nothing."""

    def _part(self, model: Any, prompts: list[list[int]], draws: list[Any], sampling: Sampling) -> Completions:
        import torch

        width = max(map(len, prompts))
        given = torch.full((len(prompts), width), sampling.pad)
        mask = torch.zeros_like(given)
        for row, prompt in enumerate(prompts):
            given[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        drawer = Drawer(draws, sampling)
        with torch.no_grad():
            out = model.generate(
                input_ids=given.to(model.device), attention_mask=mask.to(model.device), logits_processor=[drawer],
                max_new_tokens=sampling.count, do_sample=False, use_cache=True, cache_implementation=self._cache,
                eos_token_id=sampling.ends, pad_token_id=sampling.pad,
            )  # fmt: skip
        return drawer.completions(out[:, width:].tolist())


def engine_of(options: GrpoOptions, base: Base) -> Engine:
    """The engine that the options name. Raises AdapterError for an unknown one, and for a base that it cannot run."""
    if options.engine == "torch":
        return TorchEngine(cache=None if options.cache == "dynamic" else options.cache)
    if options.engine == "llama":
        from quantkit.rl.rollouts_llama import LlamaEngine

        return LlamaEngine(base, options.max_length)
    if options.engine == "vllm":
        from quantkit.rl.rollouts_vllm import VllmEngine

        folder = Path(options.server_folder) if options.server_folder else None
        return VllmEngine(base, options.server or "", options.max_length, temperature=options.temperature, folder=folder)
    raise AdapterError(f"no engine {options.engine!r}", hint="choose torch, llama or vllm")


class Drawer:
    """A logits processor of transformers that draws the next token itself, so that its probability is known.

    It leaves only the token drawn, which greedy search then takes. draws: one random generator for each prompt, so that
    a completion does not depend on its neighbours in the batch.
    """

    def __init__(self, draws: list[Any], sampling: Sampling) -> None:
        self._draws, self._sampling = draws, sampling
        self._scores: list[list[float]] = [[] for _ in draws]

    def __call__(self, ids: Any, logits: Any) -> Any:
        import torch

        shares = torch.log_softmax(logits.float() / self._sampling.temperature, -1)
        kept = cut(shares, self._sampling).exp().cpu()
        noise = torch.stack([torch.rand(kept.shape[1], generator=draw) for draw in self._draws])
        drawn = (kept / -torch.log(noise.clamp(min=1e-30))).argmax(-1).to(logits.device)  # exponential race: a draw from ``kept``
        chosen = shares.gather(1, drawn[:, None])[:, 0].tolist()
        for row, value in zip(self._scores, chosen, strict=True):
            row.append(value)
        return torch.full_like(logits, -torch.inf).scatter(1, drawn[:, None], 0.0)

    def completions(self, ids: list[list[int]]) -> Completions:
        """Tokens up to the first end, and their log-probabilities."""
        cuts = [next((n + 1 for n, token in enumerate(row) if token in self._sampling.ends), len(row)) for row in ids]
        return Completions(
            [row[:size] for row, size in zip(ids, cuts, strict=True)],
            [row[:size] for row, size in zip(self._scores, cuts, strict=True)],
        )


def cut(shares: Any, sampling: Sampling) -> Any:
    """Log-probabilities (rows, vocabulary) with −inf for what is cut off; the likeliest token always stays.

    min_p: tokens below this share of the likeliest one (arXiv 2407.01082); top_p: the least likely ones that together
    have less than 1 − top_p; top_k: all but so many.
    """
    import torch

    out = shares.clone()
    if sampling.top_k:
        least = shares.topk(min(sampling.top_k, shares.shape[-1]), -1).values[:, -1:]
        out[shares < least] = -torch.inf
    if sampling.top_p < 1:
        ordered, places = out.sort(-1)
        gone = ordered.exp().cumsum(-1) / out.exp().sum(-1, keepdim=True) <= 1 - sampling.top_p
        gone[:, -1] = False
        out[gone.scatter(1, places, gone)] = -torch.inf
    if sampling.min_p:
        out[shares < shares.max(-1, keepdim=True).values + torch.log(torch.tensor(sampling.min_p))] = -torch.inf
    return out
