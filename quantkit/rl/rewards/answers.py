"""Is the answer right: as text, or as a number."""

from __future__ import annotations

import math
import re

from quantkit.rl.rewards.base import Reward, compared
from quantkit.rl.rewards.tags import DEFAULT, Tags, solution

# Possessive repeats never give back what they took, so a match costs time linear in the text.
NUMBER = re.compile(
    r"(?P<sign>[-+]?)[$€£¥₹]?[ ]?"
    r"(?P<value>(?:(?:[0-9]{1,3}+(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?)"
    r"(?:/(?P<divisor>[0-9]++))?[ ]?%?\.?"
)
CANDIDATE = re.compile(r"(?:(?<!\w)[-+])?[$€£¥₹]?\.?[0-9][0-9,./]*+(?:[eE][-+]?[0-9]++)?")


def parse_number(text: str) -> float | None:
    """The number that a text is, or None; never raises, and takes time linear in the text.

    "12,345", "$18", "-$3", ".5", "1e3", "18.", "1/4" and "50%" (as 50) are numbers, so are those with a Unicode minus.
    Commas must part groups of three. What is too large or too small for a 64-bit float is none, and neither are "nan",
    "inf" and two numbers in a row. Numbers that differ only after 16 digits are the same.
    """
    match = NUMBER.fullmatch(text.strip().replace("−", "-"))
    if not match:
        return None
    value = _magnitude(match["value"].replace(",", ""))
    divisor = _magnitude(match["divisor"] or "1")
    if value is None or not divisor:
        return None
    share = value / divisor
    return None if value and not share else math.copysign(share, -1 if match["sign"] == "-" else 1)


def _magnitude(digits: str) -> float | None:
    """A float, or None where it would become infinite, or zero without being it."""
    value = float(digits)
    vanished = value == 0 and digits.lower().partition("e")[0].strip("0.")
    return None if math.isinf(value) or vanished else value


def first_number(text: str) -> float | None:
    """The first number in a text ("4" in "4 eggs, 2 hens"). None if there is none, or if it cannot be read ("1,2,3")."""
    match = CANDIDATE.search(text.replace("−", "-"))
    return parse_number(match[0].rstrip(",./")) if match else None


def gsm8k_answer(text: str) -> str | None:
    """What follows the last "####" of a GSM8K solution, without the spaces around it. None if there is no "####"."""
    _, mark, answer = text.rpartition("####")
    return answer.strip() if mark else None


def final(reference: str) -> str:
    """The answer of a reference that is a whole GSM8K solution, else the reference itself."""
    return gsm8k_answer(reference) or reference


def answer_score(tags: Tags = DEFAULT, column: str = "answer") -> Reward:
    """How close the solution is to the reference, on the scale of the public reasoning workshop's recipe.

    +5 the same text; +3.5 the same but for spaces around it; +2 a number within 10 % (ratio 0.9 to 1.1); +1.5 within 20 %;
    −2.5 another number; −2 if one of them is no number, or there is no solution, or a blank one. A reference of 0 has no
    ratio: another way to write 0 gets +2, all other numbers −2.5. Of a GSM8K solution the part after "####" counts. See ``compared`` for missing references and errors.
    """
    return compared("answer_score", column, lambda text, reference: _closeness(solution(text, tags), final(reference)))


def _closeness(guess: str | None, reference: str) -> float:
    if guess is None or not guess.strip():
        return -2.0
    if guess == reference:
        return 5.0
    if guess.strip() == reference.strip():
        return 3.5
    value, true = parse_number(guess), parse_number(reference)
    if value is None or true is None:
        return -2.0
    if true == 0:
        return 2.0 if value == 0 else -2.5
    ratio = value / true
    if 0.9 <= ratio <= 1.1:
        return 2.0
    return 1.5 if 0.8 <= ratio <= 1.2 else -2.5


def number_score(tags: Tags = DEFAULT, column: str = "answer") -> Reward:
    """+3.5 if the first number of the solution is the reference, −1.5 if it is another, −2.5 if there is none.

    The scale is that of the public reasoning workshop's recipe. None where the reference is no number.
    Of a GSM8K solution the part after "####" counts.
    See ``compared`` for missing references and errors.
    """
    return compared(
        "number_score", column, lambda text, reference: _equality(solution(text, tags), parse_number(final(reference)))
    )


def _equality(guess: str | None, true: float | None) -> float | None:
    if true is None:
        return None
    value = first_number(guess or "")
    if value is None:
        return -2.5
    return 3.5 if value == true else -1.5
