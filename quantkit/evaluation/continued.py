"""Texts of several models after the same prompt, side by side, and where each first departs from the original's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.evaluation.candidates import open_candidate, shown_names
from quantkit.evaluation.generate import generate
from quantkit.progress import Progress

TOKENS = 64


@dataclass(frozen=True)
class Continued:
    """What one model says after a prompt, the likeliest token each time.

    same: tokens before the first that is not the original's. speed: tokens per second after the first. seconds: until the
    first token, loading included.
    """

    prompt: str
    model: str
    text: str
    tokens: int
    same: int
    speed: float
    seconds: float


def continued(
    models: Sequence[Path], prompts: Sequence[str], count: int = TOKENS, runtime: str = "torch", device: str = "cpu",
    progress: Progress | None = None,
) -> list[Continued]:  # fmt: skip
    """Let every model go on after every prompt; the first model is the original. Raises a QuantkitError."""
    out, names = [], shown_names(models)
    task = (progress or Progress()).task("generate", total=len(prompts) * len(models), unit="texts")
    for prompt in prompts:
        original: list[int] = []
        for place, path in enumerate(models):
            found = generate(open_candidate(path), prompt, count, runtime=runtime, device=device)
            original = found.tokens if place == 0 else original
            shorter = min(len(original), len(found.tokens))
            same = next((n for n in range(shorter) if original[n] != found.tokens[n]), shorter)
            out.append(Continued(prompt, names[place], found.text, len(found.tokens), same, found.speed, found.seconds[0]))
            task.advance()
    task.done()
    return out
