"""Who waits for a job: coroutines of the server's event loop, told from any thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Watchers:
    """Events by the id of a job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    @contextlib.contextmanager
    def watching(self, id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something becomes of the job; whoever waits clears it."""
        mine = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._events.setdefault(id, []).append(mine)
        try:
            yield mine[1]
        finally:
            with self._lock:
                self._events[id].remove(mine)
                if not self._events[id]:
                    del self._events[id]

    def tell(self, id: str) -> None:
        """Wake whoever waits for a job, because something became of it."""
        with self._lock:
            waiting = list(self._events.get(id, ()))
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(event.set)

    def tell_all(self) -> None:
        """Wake everybody who waits, because the server ends."""
        with self._lock:
            ids = list(self._events)
        for id in ids:
            self.tell(id)
