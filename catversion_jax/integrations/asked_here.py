"""What the blocks ``scaled``, ``plain`` and ``chosen`` of one thread or task ask for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

# Of which encoder state, and what, the innermost block's last: a choice of concepts, or scales.
_ASKED: contextvars.ContextVar[tuple[tuple[Any, Any], ...]]
_ASKED = contextvars.ContextVar("catversion_asked", default=())


@contextlib.contextmanager
def asking(asked: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """A block of this thread or task that asks for these choices or scales, by encoder state.

    It takes back its own words and no others': blocks of two generators may end in any order.
    """
    _ASKED.set((*_ASKED.get(), *asked))
    own = set(map(id, asked))
    try:
        yield
    finally:
        _ASKED.set(tuple(one for one in _ASKED.get() if id(one) not in own))


def asked_of(state: Any) -> list[Any]:
    """What is asked of one encoder state here, by the innermost block first."""
    return [asked for of, asked in reversed(_ASKED.get()) if of is state]
