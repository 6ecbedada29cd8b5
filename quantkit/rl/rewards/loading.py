"""Rewards from a user's file, and rewards of the library by name."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.errors import RewardError
from quantkit.rl.rewards.answers import answer_score, number_score
from quantkit.rl.rewards.base import Reward, place_of
from quantkit.rl.rewards.code import code_reward
from quantkit.rl.rewards.shape import no_repetition, numeric_distance, string_distance
from quantkit.rl.rewards.tags import DEFAULT, Tags, approximate_format, exact_format

TAGGED: dict[str, Callable[[Tags], Reward]] = {
    "exact_format": exact_format,
    "approximate_format": approximate_format,
    "answer_score": answer_score,
    "number_score": number_score,
}
PLAIN: dict[str, Callable[[], Reward]] = {
    "string_distance": string_distance,
    "numeric_distance": numeric_distance,
    "no_repetition": no_repetition,
    "code": code_reward,
}
LIBRARY = "library:"
TO_BE_SET = ("length", "pattern", "language", "checklist", "learned", "judge", "audited")


@dataclass(frozen=True)
class RewardFile:
    """rewards: in the file's order. weights: of each of them, or None if the file does not say."""

    rewards: list[Reward]
    weights: list[float] | None


def by_name(name: str, tags: Tags = DEFAULT) -> Reward:
    """A reward of the library with its default settings: "library:exact_format", or "exact_format".

    tags: for those that look at tags. Raises RewardError for an unknown name, and for a reward that needs settings.
    """
    short = name.removeprefix(LIBRARY)
    if short in TAGGED:
        return TAGGED[short](tags)
    if short in PLAIN:
        return PLAIN[short]()
    if short in TO_BE_SET:
        raise RewardError(
            f"the reward {short} needs settings",
            hint=f"write a file with `from quantkit.rl.rewards import {short}` and REWARDS = [{short}(...)]",
        )
    raise RewardError(f"unknown reward {name!r}", hint=f"known: {', '.join(f'{LIBRARY}{known}' for known in (*TAGGED, *PLAIN))}")


def load_rewards(path: str | Path) -> list[Reward]:
    """The rewards of a Python file; see ``load_file``."""
    return load_file(path).rewards


def load_file(path: str | Path) -> RewardFile:
    """Run a Python file and take its list REWARDS, else its functions whose first parameters are prompts and completions.

    Functions that the file imports, and those with a leading underscore, are not taken. WEIGHTS: numbers, one for each.
    The file is run as it is now, with all that it does. Raises RewardError if it cannot be read, raises an exception, or
    has no rewards, two of the same name, or weights that do not fit.
    """
    path = Path(path)
    module = run_file(path)
    listed = vars(module).get("REWARDS")
    if listed is not None and not _is_list(listed):
        raise RewardError(f"REWARDS in {path} is a {type(listed).__name__}", hint="write REWARDS = [reward, ...]")
    rewards = _functions(module) if listed is None else list(listed)
    if not rewards:
        raise RewardError(
            f"{path} has no rewards", hint="define a function reward(prompts, completions, **columns), or a list REWARDS"
        )
    _check_names(rewards, path)
    return RewardFile(rewards, _weights(module, path, len(rewards)))


def rewards_of(said: str) -> tuple[list[Reward], tuple[float, ...]]:
    """Rewards as the command line names them, and their weights (none: all alike).

    A Python file, ``library:NAME,NAME…`` or ``library:gsm8k``. Raises RewardError.
    """
    if not said.startswith(LIBRARY):
        found = load_file(said)
        return found.rewards, tuple(found.weights or ())
    names = said.removeprefix(LIBRARY).split(",")
    names = [known for name in names for known in (TAGGED if name == "gsm8k" else [name])]
    return [by_name(name) for name in names], ()


def run_file(path: Path, what: str = "rewards") -> ModuleType:
    """Run a Python file as a module that nothing can import. what: it should have. Raises RewardError."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RewardError(f"{path} cannot be read ({error.strerror})", hint=f"give a Python file with {what}") from None
    name = f"_quantkit_rewards_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        text = error.msg if isinstance(error, SyntaxError) else error
        raise RewardError(
            f"{path} failed: {type(error).__name__}: {text} ({place_of(error, str(path))})", hint="mend the file and try again"
        ) from error
    return module


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def own_functions(module: ModuleType) -> list[Any]:
    """The file's own functions, in the order of their definition; those with a leading underscore are not taken."""
    found = (value for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_"))
    return [value for value in dict.fromkeys(found) if value.__module__ == module.__name__]


def _functions(module: ModuleType) -> list[Any]:
    """Those of them that are rewards."""
    return [value for value in own_functions(module) if [*inspect.signature(value).parameters][:2] == ["prompts", "completions"]]


def _check_names(rewards: list[Any], path: Path) -> None:
    names = []
    for number, reward in enumerate(rewards):
        name = getattr(reward, "__name__", None)
        if not callable(reward) or inspect.isclass(reward) or not isinstance(name, str):
            raise RewardError(
                f"REWARDS[{number}] in {path} is a {type(reward).__name__} without a name, or cannot be called",
                hint="give functions; named('its name', function) gives one a name",
            )
        if name in names:
            raise RewardError(f"{path} has two rewards named {name}", hint="tell them apart: named('its name', function)")
        names.append(name)


def _weights(module: ModuleType, path: Path, count: int) -> list[float] | None:
    weights = vars(module).get("WEIGHTS")
    if weights is None:
        return None
    if not _is_list(weights) or len(weights) != count:
        found = f"{len(weights)} entries" if _is_list(weights) else f"the type {type(weights).__name__}"
        raise RewardError(f"WEIGHTS in {path} has {found} for {count} rewards", hint="give a list with one number for each")
    for number, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RewardError(f"WEIGHTS[{number}] in {path} is {weight!r}", hint="give a finite number")
    return [float(weight) for weight in weights]
