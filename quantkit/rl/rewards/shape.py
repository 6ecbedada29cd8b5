"""What a completion looks like: how near to a reference, how long, in which script, how repetitive. All from 0 to 1."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from quantkit.errors import RewardError
from quantkit.rl.rewards.answers import first_number, parse_number
from quantkit.rl.rewards.base import Reward, compared, scored
from quantkit.rl.rewards.scripts import LANGUAGES, UNSPACED, script_of
from quantkit.rl.rewards.tags import Tags, solution

COMPARED = 2000
SEARCHED = 20_000


def string_distance(reference_column: str = "answer", tags: Tags | None = None) -> Reward:
    """1 − edits / length of the longer text: 1 for equal texts, 0 for those with nothing in common.

    tags: compare the solution rather than the whole completion; 0 without one. Of both texts the first 2,000 characters
    count. See ``compared`` for missing references and errors.
    """

    def score(text: str, reference: str) -> float:
        guess = solution(text, tags) if tags else text
        if guess is None:
            return 0.0
        a, b = guess[:COMPARED], reference[:COMPARED]
        return 1 - edits(a, b) / max(len(a), len(b))

    return compared("string_distance", reference_column, score)


def edits(a: str, b: str) -> int:
    """The Levenshtein distance: single characters to insert, delete or replace to turn one text into the other.

    A column of the table is two integers, bits for the steps of +1 and −1 (Myers 1999, as in Hyyrö 2003, figure 8).
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for place, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << place
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    plus, minus, distance = every, 0, len(a)
    for letter in b:
        match = places.get(letter, 0)
        level = (((match & plus) + plus) ^ plus) | match | minus
        more, less = minus | (every & ~(level | plus)), plus & level
        distance += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        plus, minus = every & (less | ~(level | more)), every & more & level
    return distance


def numeric_distance(reference_column: str = "answer", tags: Tags | None = None) -> Reward:
    """exp(−|a − b| / max(|b|, 1)) of a number a and the reference b; 0 without a number, None if the reference is none.

    a: the whole completion, or with tags the first number of the solution. See ``compared`` for missing references.
    """

    def score(text: str, reference: str) -> float | None:
        true = parse_number(reference)
        if true is None:
            return None
        value = first_number(solution(text, tags) or "") if tags else parse_number(text)
        scale = max(abs(true), 1.0)
        return 0.0 if value is None else math.exp(-abs(value / scale - true / scale))

    return compared("numeric_distance", reference_column, score)


def length(minimum: int, maximum: int, unit: str = "characters") -> Reward:
    """1 from minimum to maximum, falling linearly to 0 at half the minimum and at twice the maximum.

    unit: "characters" or "words" (what stands between spaces). Raises RewardError for limits that cannot be.
    """
    if unit not in ("characters", "words"):
        raise RewardError(f"length cannot count {unit!r}", hint="give characters or words")
    if not 0 <= minimum <= maximum or maximum == 0:
        raise RewardError(
            f"length cannot lie between {minimum} and {maximum}", hint="give 0 ≤ minimum ≤ maximum, maximum above 0"
        )

    def score(text: str) -> float:
        size = len(text.split()) if unit == "words" else len(text)
        if size < minimum:
            return max(0.0, 2 * size / minimum - 1)
        return 1.0 if size <= maximum else max(0.0, 2 - size / maximum)

    return scored("length", score)


def pattern(regex: str) -> Reward:
    """1 if the regular expression is found in the first 20,000 characters, else 0. Raises RewardError if it is none.

    The time it takes is up to the expression: one with nested repeats can take for ever.
    """
    try:
        compiled = re.compile(regex)
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise RewardError(f"{regex!r} is no regular expression ({error})", hint="see docs.python.org/3/library/re") from None
    return scored("pattern", lambda text: 1.0 if compiled.search(text[:SEARCHED]) else 0.0)


def language(codes: str | Sequence[str]) -> Reward:
    """The share of letters in a script of these languages (ISO 639-1, for example "ru" or ["ja", "en"]); 0 without letters.

    It sees scripts, not words: English and German look alike. Raises RewardError for an unknown language.
    """
    wanted: set[str] = set()
    for code in [codes] if isinstance(codes, str) else codes:
        if code not in LANGUAGES:
            raise RewardError(f"unknown language {code!r}", hint=f"known: {', '.join(LANGUAGES)}")
        wanted |= LANGUAGES[code]
    if not wanted:
        raise RewardError("language was given no code", hint=f"known: {', '.join(LANGUAGES)}")

    def score(text: str) -> float:
        letters = {letter: count for letter, count in Counter(text).items() if letter.isalpha()}
        inside = sum(count for letter, count in letters.items() if script_of(letter) in wanted)
        return inside / sum(letters.values()) if letters else 0.0

    return scored("language", score)


def checklist(items: str | Sequence[str]) -> Reward:
    """The share of items that occur as whole words, in any case and with any space between their words.

    Where a script knows no spaces (Chinese, Japanese, Thai), any place counts. Raises RewardError for a blank item or none.
    """
    items = [items] if isinstance(items, str) else list(items)
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise RewardError(f"a checklist of {items!r} has a blank item or none", hint="give words that must occur")
    searches = [re.compile(_whole(item.split()), re.IGNORECASE) for item in items]
    return scored("checklist", lambda text: sum(bool(search.search(text)) for search in searches) / len(searches))


def _whole(words: list[str]) -> str:
    """The expression for words in a row that are no part of longer ones."""
    before = "" if script_of(words[0][0]) in UNSPACED else r"(?<!\w)"
    after = "" if script_of(words[-1][-1]) in UNSPACED else r"(?!\w)"
    return before + r"\s+".join(map(re.escape, words)) + after


def no_repetition(n: int = 4) -> Reward:
    """1 − the share of runs of n words that were there before, in any case; 1 if there are fewer words, 0 without any.

    Words are what stands between spaces. Raises RewardError for n below 1.
    """
    if n < 1:
        raise RewardError(f"no_repetition cannot look at runs of {n} words", hint="give 1 or more")

    def score(text: str) -> float:
        words = text.casefold().split()
        runs = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        return len(set(runs)) / len(runs) if runs else float(bool(words))

    return scored("no_repetition", score)
