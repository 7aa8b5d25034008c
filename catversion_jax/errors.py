"""Errors a user can correct. Every message says the value, the rule and the remedy."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence


class CatVersionError(ValueError):
    """A mistake in the input. The command line prints the message and exits with code 2.

    What UTF-8 has no bytes for, such as a file name of another encoding, is written escaped in the
    message, so that every message can be printed and stored.
    """

    def __init__(self, message: object = ""):
        super().__init__(encodable(str(message)))


class ConceptError(CatVersionError):
    """A mistake in one concept. Training quarantines that concept and goes on with the others."""


def encodable(text: str) -> str:
    """``text`` with what UTF-8 cannot hold written as an escape: broken names, lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: object, length: int = 200) -> str:
    """A value, or the text of an error, short enough for a message, on one line.

    Args:
      value: an exception gives its first line, or its class where it says nothing; anything else
        its ``repr``, with the middle left out where it is long.
      length: most characters.
    """
    if isinstance(value, BaseException):
        lines = str(value).strip().splitlines() or [type(value).__name__]
        return encodable(lines[0])[:length]
    short = reprlib.Repr()
    short.maxstring = short.maxother = length
    short.maxlist = short.maxtuple = short.maxdict = 6
    short.maxlevel = 3
    try:
        text = short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"<{type(value).__name__}>"
    return encodable(text if len(text) <= length else f"{text[: length - 4]} ...")


def listed(texts: Sequence[str], most: int = 5) -> list[str]:
    """The first ``most`` of ``texts``; where there are more, a last text says how many."""
    left = len(texts) - most
    return [*texts[:most], f"and {left} more"] if left > 0 else list(texts)


def counted(number: int, noun: str) -> str:
    """``1 concept``, ``2 concepts``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def did_you_mean(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The hint that closes a message about a misspelt word.

    Args:
      word: what was typed.
      choices: the words that would have been right.
      cutoff: least similarity, 0 to 1, of a choice that is offered (``difflib``'s ratio).

    Returns:
      ``" Did you mean 'nearest'?"`` with a leading space, or ``""`` where no choice is near.
    """
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
