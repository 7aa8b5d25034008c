"""The words that call a concept: whether a prompt contains them, and which forms of them do.

A class word counts where it stands as a word of its own: "teapot" is not in "teapotlike", "cat" not
in "housecat". Other forms of it (``class_forms``) call the concept too: its regular English plural
unless the concept lists its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex

# CLIP's own splitting before byte pairs (openai/CLIP simple_tokenizer.py): contractions, runs of
# letters, single digits, runs of anything else. Equal pieces give equal tokens. Python's own
# expressions have no classes of Unicode.
_PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
# Languages that CLIP's splitting knows to end words by spaces; a plural is written in them.
_ENGLISH_WORD = re.compile(r"[A-Za-z]*[A-Za-z]{2}$")

LONGEST_WORDS = 200
"""Characters of a base class."""

LONGEST_FORM = LONGEST_WORDS + 2  # the plural of the longest

MOST_FORMS = 100
"""Further forms of a base class; every prompt is searched for each."""


def are_plain_words(text: str, longest: int) -> bool:
    """Whether a text can be a base class or a form of it, such as "stuffed animal"."""
    sound = all(c not in "{}<>" and c.isprintable() for c in text)
    return sound and any(c.isalnum() for c in text) and len(text) <= longest


def contains_words(prompt: str, words: str | Sequence[str]) -> bool:
    """Whether ``words``, or one of several forms of them, appear in ``prompt`` next to each other
    and as words of their own, as the tokenizer would see them.
    """
    pieces = _pieces(prompt)
    forms = [_pieces(form) for form in ((words,) if isinstance(words, str) else words)]
    return any(
        pieces[start : start + len(form)] == form
        for form in forms
        if form
        for start in range(len(pieces) - len(form) + 1)
    )


def contains_inside(prompt: str, words: str) -> bool:
    """Whether ``words`` appear in ``prompt`` at all, be it inside a longer word."""
    return _lower(words) in _lower(prompt)


def plural_forms(base_class: str) -> tuple[str, ...]:
    """The regular English plural of a class word, of its last word if there are several: "teapots",
    "foxes", "ponies"; both spellings after a consonant and "o"; () where the word does not end in
    two English letters, as in other scripts.
    """
    if not _ENGLISH_WORD.search(base_class):
        return ()
    last, before = base_class[-1].lower(), base_class[-2].lower()
    if last == "y" and before not in "aeiou":
        return (base_class[:-1] + "ies",)
    if last in "sxz" or (last == "h" and before in "cs"):
        return (base_class + "es",)
    if last == "o" and before not in "aeiou":
        return (base_class + "s", base_class + "es")
    return (base_class + "s",)


def _lower(text: str) -> str:
    """The text as CLIP's tokenizer normalizes it; letter by letter, as it does not know the final
    sigma.
    """
    return "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(_lower(text))
