"""Errors a user can correct. Every message says the value, the rule and the remedy."""

import difflib
from collections.abc import Iterable


class CatVersionError(ValueError):
    """A mistake in the input. The command line prints the message and exits with code 2."""


class ConceptError(CatVersionError):
    """A mistake in one concept. Training quarantines that concept and goes on with the others."""


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
