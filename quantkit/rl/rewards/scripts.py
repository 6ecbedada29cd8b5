"""Which script a letter belongs to, and which scripts a language is written in."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# How the Unicode names of a script's letters begin.
PREFIXES = {
    "Latin": ("LATIN", "FULLWIDTH LATIN"),
    "Cyrillic": ("CYRILLIC",),
    "Greek": ("GREEK",),
    "Han": ("CJK", "IDEOGRAPHIC"),
    "Kana": ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    "Hangul": ("HANGUL", "HALFWIDTH HANGUL"),
    "Arabic": ("ARABIC",),
    "Hebrew": ("HEBREW",),
    "Devanagari": ("DEVANAGARI",),
    "Thai": ("THAI",),
}
CODES = {
    "Latin": "af az bs ca cs cy da de en es et eu fi fr ga gl hr hu id is it la lt lv ms mt nb nl nn no pl pt ro "
    "sk sl sq sr sv sw tl tr uz vi",
    "Cyrillic": "be bg kk ky mk mn ru sr tg uk",
    "Greek": "el",
    "Han": "ja zh",
    "Kana": "ja",
    "Hangul": "ko",
    "Arabic": "ar fa ps ur",
    "Hebrew": "he yi",
    "Devanagari": "hi mr ne sa",
    "Thai": "th",
}
LANGUAGES = {
    code: frozenset(script for script, codes in CODES.items() if code in codes.split())
    for code in sorted({code for codes in CODES.values() for code in codes.split()})
}
UNSPACED = {"Han", "Kana", "Thai"}  # written without spaces between words


@lru_cache(maxsize=65536)
def script_of(letter: str) -> str | None:
    """The script of one character, or None if it has none of those known here."""
    name = unicodedata.name(letter, "")
    return next((script for script, prefixes in PREFIXES.items() if name.startswith(prefixes)), None)
