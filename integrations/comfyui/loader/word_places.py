"""Where class words stand in a tokenized prompt, and which tokens see a concept.

The rules of ``models/clip/tokenizer.py`` and ``methods/residual.py``, for a prompt of which only
the ids are there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def ids_inside_words(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens after which a word goes on: CLIP's byte pairs end a word with ``</w>``,
    and special and added tokens are words by themselves.
    """
    whole = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    vocabulary = tokenizer.get_vocab().items()
    return frozenset(i for token, i in vocabulary if not token.endswith("</w>")) - whole


def content(ids: list[int], bos: int, eos: int) -> tuple[int, ...]:
    """A row's own tokens, between begin-of-text and the first end-of-text."""
    start = 1 if ids[:1] == [bos] else 0
    stop = ids.index(eos, start) if eos in ids[start:] else len(ids)
    return tuple(ids[start:stop])


def word_positions(
    prompt: tuple[int, ...], forms: Sequence[tuple[int, ...]], inside_word: frozenset[int]
) -> list[int]:
    """Where a class word or one of its forms stands among a prompt's own tokens, every time.

    It is a word of its own: the token before it ends a word, so "cat" is not in "housecat".
    Where several forms begin at one token the longest counts.
    """
    words = sorted(filter(None, forms), key=len, reverse=True)
    found: list[int] = []
    end = 0
    for position in range(len(prompt)):
        if position < end or (position and prompt[position - 1] in inside_word):
            continue
        for word in words:
            if prompt[position : position + len(word)] == word:
                end = position + len(word)
                found += range(position, end)
                break
    return found


def seeing_positions(
    scope: str, own: Sequence[int], others: Collection[int], length: int
) -> Sequence[int]:
    """The tokens of a row that see a concept.

    Args:
      scope: ``all``, ``from_class_word`` or ``class_word``.
      own: where its class word stands; without one all tokens see it.
      others: where the words of the concepts stand that it is kept apart from; with them nothing
        before its own word sees it, and nothing from another word on until its own comes again.
      length: of the row.
    """
    if not own or (scope == "all" and not others):
        return range(length)
    if scope == "class_word":
        return own
    seeing: list[int] = []
    sees = False
    for position in range(length):
        sees = position in own or (sees and position not in others)
        if sees:
            seeing.append(position)
    return seeing
