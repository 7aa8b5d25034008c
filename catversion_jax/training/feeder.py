"""Concepts are read and encoded in the background while others train."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Feeder(Generic[T]):
    """Calls ``prepare(name)`` for one name after the other in a thread, at most ``ahead`` of them
    before they are asked for; leaving the block ends the thread.

    Attributes:
      exhausted: whether :meth:`next` has said that there is no other.
    """

    def __init__(self, names: Iterable[str], prepare: Callable[[str], T], ahead: int):
        self._names, self._prepare = names, prepare
        self._ready: queue.Queue[object] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self.exhausted = False

    def next(self) -> T | None:
        """The next prepared concept, waiting for it; None when there is no other.

        Raises:
          Exception: whatever ``prepare`` raised, in the caller's thread.
        """
        return self._taken(wait=True)

    def _taken(self, *, wait: bool) -> T | None:
        if self.exhausted:
            return None
        try:
            item = self._ready.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self.exhausted = True
            raise item
        if item is _END:
            self.exhausted = True
            return None
        return item  # type: ignore[return-value]

    def __enter__(self) -> Feeder[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # a full queue must not keep the thread from ending
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self) -> None:
        try:
            for name in self._names:
                self._ready.put(self._prepare(name))
                if self._stop.is_set():
                    return
            self._ready.put(_END)
        except BaseException as error:  # handed to the caller
            self._ready.put(error)
