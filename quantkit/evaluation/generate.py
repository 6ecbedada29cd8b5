"""Text from a model, token by token: through torch, where quantized weights stay packed, or through llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.evaluation.runners import open_llama
from quantkit.evaluation.tune import tuned_arguments
from quantkit.kernels.devices import default_dtype
from quantkit.modeling.packed import packed_model
from quantkit.modeling.products import fast_float32
from quantkit.modeling.text import TextEncoder

HALF = "\ufffd"  # at the end of a text: the bytes of a character are not complete yet


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature: 0 takes the most likely. top_k: 0 for all. top_p: 1 for all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise QuantkitError(
                f"cannot sample with temperature {self.temperature:g}, top-k {self.top_k}, top-p {self.top_p:g}",
                hint="temperature and top-k are at least 0, top-p lies above 0 and at most at 1",
            )


@dataclass
class Generation:
    """prompt, tokens: ids. text: of the tokens. seconds: (for the prompt and the first token, for all others)."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def speed(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.seconds[1] if len(self.tokens) > 1 else 0.0


def generate(
    checkpoint: Checkpoint, prompt: str, count: int = 128, sampling: Sampling | None = None, *, runtime: str = "torch",
    device: str = "cpu", chat: bool = False, compiled: bool = False, show: Callable[[str], None] | None = None,
) -> Generation:  # fmt: skip
    """At most ``count`` tokens after ``prompt``, fewer if the model ends its text.

    chat: the prompt is a user's message in the model's chat template. compiled: let torch compile the model, as
    ``quantkit tune`` found best. show: is called with each new piece of text. Raises CalibrationError for a prompt that is
    empty or fills the context, PlanError if the model was not tuned, CheckpointError if the runtime cannot run it.
    """
    encoder = TextEncoder(checkpoint)
    if chat:
        prompt = encoder.render_chat([{"role": "user", "content": prompt}], answer=True)
    out = Generation(encoder.prompt(prompt))
    if not out.prompt:
        raise CalibrationError("the prompt is empty", hint="give some text")
    context = int(checkpoint.config.get("max_position_embeddings") or len(out.prompt) + count)
    if len(out.prompt) >= context:
        raise CalibrationError(f"the prompt has {len(out.prompt)} tokens, the model's context {context}", hint="shorten it")
    count = min(count, context - len(out.prompt))
    sampling, started = sampling or Sampling(), time.perf_counter()
    first, shown = started, 0
    if runtime == "llama":
        tokens = _llama(checkpoint, out.prompt, count, sampling, encoder.ends)
    else:
        tokens = _torch(checkpoint, out.prompt, count, sampling, encoder.ends, device, compiled)
    head = len(encoder.decode(out.prompt))
    for token in tokens:
        first = first if out.tokens else time.perf_counter()
        out.tokens.append(token)
        out.text = encoder.decode(out.prompt + out.tokens)[head:]
        if not out.text.endswith(HALF):
            shown = _show_from(out.text, shown, show)
    _show_from(out.text, shown, show)
    first = first if out.tokens else time.perf_counter()
    out.seconds = (first - started, time.perf_counter() - first)
    return out


def _show_from(text: str, shown: int, show: Callable[[str], None] | None) -> int:
    """Show what was not shown yet; returns how much is shown."""
    if show and len(text) > shown:
        show(text[shown:])
    return len(text)


def _torch(
    checkpoint: Checkpoint, ids: list[int], count: int, sampling: Sampling, ends: list[int], device: str, compiled: bool
) -> Iterator[int]:
    """transformers' forward with its cache, one token at a time."""
    import torch
    from transformers import DynamicCache, StaticCache

    arguments = tuned_arguments(checkpoint.identity, device) if compiled else None
    model = packed_model(checkpoint, default_dtype(device), device)
    chance = torch.Generator().manual_seed(sampling.seed)
    fixed = StaticCache(config=model.config, max_cache_len=len(ids) + count) if arguments is not None else None
    cache: Any = DynamicCache(config=model.config) if fixed is None else fixed
    step = torch.compile(model.forward, **arguments) if arguments is not None else model.forward
    given = torch.tensor([ids], device=device)
    for number in range(count):
        with torch.inference_mode(), fast_float32():
            out = (step if number else model.forward)(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = choose(out.logits[0, -1].float().cpu(), sampling, chance)
        if token in ends:
            return
        yield token
        given = torch.tensor([[token]], device=device)


def choose(logits: Any, sampling: Sampling, chance: Any) -> int:
    """The next token. logits: float32 (vocabulary,); chance: torch's generator of random numbers."""
    import torch

    if not sampling.temperature:
        return int(logits.argmax())
    scores, tokens = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        scores = scores[: sampling.top_k]
    shares = scores.softmax(0)
    shares = shares[: int((shares.cumsum(0) - shares < sampling.top_p).sum())]
    return int(tokens[torch.multinomial(shares, 1, generator=chance)])


def _llama(checkpoint: Checkpoint, ids: list[int], count: int, sampling: Sampling, ends: list[int]) -> Iterator[int]:
    """llama.cpp's own loop, and its own way of choosing."""
    with open_llama(checkpoint, len(ids) + count, seed=sampling.seed + 1) as model:  # llama-cpp-python takes 0 for none
        tokens = model.generate(ids, temp=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=0.0)
        for _, token in zip(range(count), tokens, strict=False):
            if token in ends:
                return
            yield int(token)
