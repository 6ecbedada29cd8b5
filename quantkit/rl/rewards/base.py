"""What a reward is, and the two shapes that nearly all of them have: of a text, and of a text beside a reference."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import RewardError

SHOWN = 80


class Reward(Protocol):
    """Scores completions. prompts, completions: texts or lists of messages; columns: other fields of the data set.

    One value for each completion; None: the reward does not apply to it. ``__name__`` is its column in TRL's logs.
    """

    __name__: str

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]: ...


def named(name: str, function: Callable[..., Any]) -> Reward:
    """``function`` as a reward of that name. The function itself is not changed."""

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        return function(prompts=prompts, completions=completions, **columns)

    reward.__name__ = reward.__qualname__ = name
    return reward


def text_of(completion: Any) -> str:
    """What the model said: the text itself, or that of the assistant's messages, one a line.

    Messages of tools and users are left out, and so is content other than text. Raises RewardError.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(message, dict) for message in completion):
        raise RewardError(
            f"a completion is neither text nor messages: {repr(completion)[:SHOWN]}",
            hint="give a string or a list of {'role': ..., 'content': ...}",
        )
    return "\n".join(_content(m.get("content")) for m in completion if m.get("role", "assistant") == "assistant")


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def excerpt(completion: Any) -> str:
    """The first 80 characters of a completion, in quotes, for an error message."""
    try:
        return repr(text_of(completion)[:SHOWN])
    except RewardError:
        return repr(completion)[:SHOWN]


def scored(name: str, score: Callable[[str], float | None]) -> Reward:
    """A reward that looks at the completion alone."""

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        return [score(text_of(completion)) for completion in completions]

    return named(name, reward)


def compared(name: str, column: str, score: Callable[[str, str], float | None]) -> Reward:
    """A reward of the completion beside the reference in a column; None where the reference is missing or blank.

    Calling it raises RewardError if the column is missing, of another length, or holds neither text nor numbers.
    """

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        values = columns.get(column)
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            raise RewardError(
                f"the reward {name} needs the column {column!r} with {len(completions)} values, one for each completion",
                hint=f"there are {', '.join(sorted(columns)) or 'no columns'}; name another one where the reward is made",
            )
        references = [_reference(name, column, number, value) for number, value in enumerate(values)]
        return [
            None if reference is None else score(text_of(completion), reference)
            for completion, reference in zip(completions, references, strict=True)
        ]

    return named(name, reward)


def _reference(name: str, column: str, number: int, value: Any) -> str | None:
    """A cell as text: 18.0 is "18"; None for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise RewardError(
            f"the reward {name} cannot use the column {column!r}: entry {number} is a {type(value).__name__}",
            hint="give text or numbers",
        )
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text if text.strip() else None


def place_of(error: BaseException, file: str | None) -> str:
    """The innermost line of ``file`` that an error came through, else where it was raised: "rewards.py, line 7"."""
    if isinstance(error, SyntaxError) and file is not None and error.filename == file and error.lineno:
        return f"{Path(file).name}, line {error.lineno}"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    found = [frame for frame in frames if frame[0] == file] or frames
    return f"{Path(found[-1][0]).name}, line {found[-1][1]}" if found else "an unknown line"
