"""Random answers: tokens drawn with numbers that depend on the prompt and on which of its answers is drawn, and on nothing else.

A token is the largest of score ÷ temperature + Gumbel noise, which is a draw from their softmax (Gumbel, 1954; Maddison et
al., arXiv 1411.0030). Two models get the same noise, so where their distributions are close they mostly say the same: what
differs is the models and not the dice. Batches, runtimes and runs that were killed change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluation.generate import Sampling

if TYPE_CHECKING:
    import torch

NUMBER = "draw"  # argument of generating: which of the answers to a prompt; beside lm-eval's own, so its cache tells them apart
KNOWN = ("do_sample", "temperature", "top_k", "top_p", "seed", NUMBER)
HARMLESS = {"num_beams": 1, "use_cache": True}  # what says nothing new


@dataclass(frozen=True)
class Draw:
    """How one answer to a prompt is drawn. number: which of the answers to the same prompt."""

    sampling: Sampling
    number: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> Draw:
        """From arguments of lm-eval's generating, without those of stopping.

        Raises QuantkitError for a way of drawing that is not built.
        """
        other = [name for name, value in options.items() if name not in KNOWN and HARMLESS.get(name) != value]
        if other:
            raise QuantkitError(f"the task draws answers with {', '.join(other)}", hint="temperature, top_k and top_p are known")
        sampling = Sampling(
            float(options.get("temperature", 1.0)), int(options.get("top_k") or 0), float(options.get("top_p") or 1.0),
            int(options.get("seed") or 0),
        )  # fmt: skip
        return cls(sampling, int(options.get(NUMBER, 0)))

    def stream(self, prompt: Sequence[int]) -> np.random.Generator:
        """Random numbers of this answer to a prompt (its token ids)."""
        key = json.dumps([self.sampling.seed, self.number, list(map(int, prompt))])
        return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()))


class Drawer:
    """A logits processor of transformers: what it adds makes the greedy choice a random one.

    Of ``streams``, one belongs to each row.
    """

    def __init__(self, draw: Draw, streams: Sequence[np.random.Generator]) -> None:
        self._sampling, self._streams = draw.sampling, streams

    def __call__(self, ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
        """Scores with their noise, float32, −inf for what is cut off. logits: (rows, vocabulary)."""
        import torch

        scores = cut(logits.float() / self._sampling.temperature, self._sampling)
        noise = np.stack([-np.log(stream.standard_exponential(scores.shape[1])) for stream in self._streams])
        return scores + torch.from_numpy(noise.astype(np.float32)).to(scores.device)


def cut(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores (rows, vocabulary) with −inf for all but the top_k best, and for what the likeliest top_p of the rest leave out."""
    import torch

    if not sampling.top_k and sampling.top_p == 1:
        return scores
    best, places = scores.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        best[:, sampling.top_k :] = -torch.inf
    shares = best.softmax(-1)
    best[shares.cumsum(-1) - shares >= sampling.top_p] = -torch.inf
    return torch.empty_like(scores).scatter(-1, places, best)


def is_random(options: dict[str, Any]) -> bool:
    """Whether arguments of generating ask for a random answer; not at temperature 0, where only the likeliest is left."""
    asked = options.get("do_sample")
    return asked is not False and float(options.get("temperature", 1.0 if asked else 0.0)) > 0


def numbered(requests: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """(prompt, arguments) of each request; equal ones that ask for random answers get a number each, from 0."""
    seen: dict[str, int] = {}
    out = []
    for prompt, options in requests:
        if is_random(options):
            key = json.dumps([prompt, options], sort_keys=True, default=str)
            options = {**options, NUMBER: seen.get(key, 0)}
            seen[key] = seen.get(key, 0) + 1
        out.append((prompt, options))
    return out
