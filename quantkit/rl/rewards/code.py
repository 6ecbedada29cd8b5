"""Does the code that the model wrote work: it is run against calls with known results, and gets graded credit."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RewardError
from quantkit.rl.rewards.base import Reward, named, text_of
from quantkit.rl.sandbox import DEFAULT, Call, Limits, Outcome, run_code

STEPS = {"nothing": 0.0, "parsed": 0.1, "defined": 0.3, "called": 0.5}
RIGHT = 0.5  # for all values right; a share of it for a share of them
FORBIDDEN = -0.5
FENCES = ("```python", "```python3", "```py")
RELATIVE = 1e-9


@dataclass(frozen=True)
class Check:
    """A call and what it should return."""

    call: Call
    expected: Any


def code_reward(calls_column: str = "tests", limits: Limits = DEFAULT, workers: int | None = None) -> Reward:
    """From −0.5 to 1: the program parses +0.1, defines its names without an error +0.2, returns from all calls +0.2, and +0.5
    times the share of calls that return what is expected. What times out or fails keeps what it had reached; −0.5 for what
    is forbidden (see ``sandbox``).

    The program is the last block fenced with ```python, else the whole completion. calls_column: for each row a list of
    {"call": "f", "args": [...], "expected": ...}, or the same as JSON; None where it is missing or empty. workers: programs
    at a time, by default one for each core. Calling it raises RewardError for a column that is missing or malformed.
    """

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        rows = columns.get(calls_column)
        if not isinstance(rows, list | tuple) or len(rows) != len(completions):
            raise RewardError(
                f"the reward code needs the column {calls_column!r} with {len(completions)} values, one for each completion",
                hint=f"there are {', '.join(sorted(columns)) or 'no columns'}; name another one where the reward is made",
            )
        checks = [checks_of(row, number) for number, row in enumerate(rows)]
        sources = [source_of(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            return list(pool.map(lambda source, some: _score(source, some, limits), sources, checks))

    return named("code", reward)


def _score(source: str, checks: list[Check], limits: Limits) -> float | None:
    if not checks:
        return None
    return credit(run_code(source, [check.call for check in checks], limits), [check.expected for check in checks])


def credit(outcome: Outcome, expected: list[Any]) -> float:
    """What a run is worth. expected: plain JSON data, one for each call."""
    if outcome.status == "forbidden":
        return FORBIDDEN
    right = sum(ran and same(value, true) for ran, value, true in zip(outcome.ran, outcome.values, expected, strict=True))
    return round(STEPS[outcome.reached] + RIGHT * right / max(1, len(expected)), 9)


def checks_of(row: Any, number: int) -> list[Check]:
    """The checks of one row. Raises RewardError that names the row."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise RewardError(f"row {number}: the tests are no JSON ({error})", hint="give a list of objects") from None
    if row is None:
        return []
    try:
        return [Check(Call(_text(item["call"]), list(item["args"])), json.loads(json.dumps(item["expected"]))) for item in row]
    except (TypeError, ValueError, KeyError) as error:
        raise RewardError(
            f"row {number}: the tests are malformed ({type(error).__name__}: {error})",
            hint='give a list of {"call": "f", "args": [...], "expected": ...} with plain data',
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the name of a function is a {type(value).__name__}")
    return value


def source_of(text: str) -> str:
    """The last block fenced with ```python (also ```py and ```python3) that is closed, else the whole text."""
    found = text
    block: list[str] | None = None
    for line in text.split("\n"):
        mark = line.strip()
        if block is None:
            block = [] if mark.lower() in FENCES else None
        elif mark == "```":
            found, block = "\n".join(block) + "\n", None
        else:
            block.append(line)
    return found


def same(value: Any, true: Any) -> bool:
    """Whether plain data are equal: bool is not int, floats within 1e-9 of their size, an integer may stand for a float.

    A float does not stand for an integer, and NaN equals nothing.
    """
    if isinstance(true, float) and type(value) in (int, float):
        try:
            return math.isclose(value, true, rel_tol=RELATIVE)
        except OverflowError:
            return False
    if type(value) is not type(true):
        return False
    if isinstance(true, list):
        return len(value) == len(true) and all(map(same, value, true))
    if isinstance(true, dict):
        return value.keys() == true.keys() and all(same(value[key], item) for key, item in true.items())
    return bool(value == true)
