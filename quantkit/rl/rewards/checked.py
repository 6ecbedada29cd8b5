"""A guard around a reward: what it does wrong becomes an error that names it, and never a silent NaN in training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from quantkit.errors import RewardError
from quantkit.rl.rewards.base import Reward, excerpt, named, place_of


def checked(reward: Callable[..., Any]) -> Reward:
    """The same reward under the same name; it raises RewardError for an exception, a wrong count or a value that is no number.

    NaN and infinity are no numbers, None is allowed. The error names the reward, the completion's index and its first 80
    characters. After an exception the reward is called again for one completion at a time, to find the one it fails on.
    """
    name = getattr(reward, "__name__", None)
    if not isinstance(name, str):
        raise RewardError(f"a reward of type {type(reward).__name__} has no name", hint="wrap it: named('its name', reward)")

    def call(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            found = reward(prompts=prompts, completions=completions, **columns)
        except Exception as error:
            raise _failure(reward, error, prompts, completions, columns) from error
        _check_count(name, found, completions)
        return [_number(name, index, value, completions[index]) for index, value in enumerate(found)]

    return named(name, call)


def _failure(reward: Any, error: Exception, prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> RewardError:
    index = _culprit(reward, type(error), prompts, completions, columns)
    where = f"{len(completions)} completions together" if index is None else f"completion {index} ({excerpt(completions[index])})"
    if isinstance(error, RewardError):
        return RewardError(f"the reward {reward.__name__} failed for {where}: {error.what}", hint=error.hint)
    place = place_of(error, getattr(getattr(reward, "__code__", None), "co_filename", None))
    return RewardError(
        f"the reward {reward.__name__} failed for {where}: {type(error).__name__}: {error} ({place})",
        hint="return None where the reward does not apply",
    )


def _culprit(
    reward: Any, kind: type[Exception], prompts: list[Any], completions: list[Any], columns: dict[str, Any]
) -> int | None:
    """Index of the first completion that alone causes the same kind of error; None if none does."""
    count = len(completions)
    for index in range(count):
        alone = {
            name: [value[index]] if isinstance(value, list) and len(value) == count else value for name, value in columns.items()
        }
        try:
            reward(prompts=prompts[index : index + 1], completions=completions[index : index + 1], **alone)
        except Exception as error:
            if type(error) is kind:
                return index
    return None


def _check_count(name: str, found: Any, completions: list[Any]) -> None:
    if not isinstance(found, list | tuple):
        if inspect.iscoroutine(found):
            found.close()
        raise RewardError(
            f"the reward {name} returned a {type(found).__name__} for {len(completions)} completions, not a list",
            hint="write it without async, and return a list of numbers (.tolist() turns an array into one)",
        )
    if len(found) != len(completions):
        index = len(found)
        first = f"; the first without one is {index} ({excerpt(completions[index])})" if index < len(completions) else ""
        raise RewardError(
            f"the reward {name} returned {len(found)} values for {len(completions)} completions{first}",
            hint="return one value for each completion, None where the reward does not apply",
        )


def _number(name: str, index: int, value: Any, completion: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if math.isfinite(number):
        return number
    shown = f"{type(value).__name__} {number if isinstance(value, Real) else repr(value)[:40]}"
    raise RewardError(
        f"the reward {name} gave completion {index} ({excerpt(completion)}) the {shown}, no finite number",
        hint="return a number, or None where the reward does not apply",
    )
