"""Progress bars of the commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (units done, units in all) that moves a bar.

    The bar appears with the first call, below the warnings that come before it, and another one
    with every call that begins again from a smaller number.
    """
    from tqdm import tqdm

    bars: list[Any] = []

    def advance(done: int, total: int) -> None:
        if not bars or done <= bars[-1].n:
            bars.append(tqdm(desc=title, total=total, unit=unit))
        bars[-1].update(done - bars[-1].n)
        if done == total:
            bars[-1].close()

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
