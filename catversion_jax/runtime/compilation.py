"""What was compiled, and what was found in the persistent compilation cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.monitoring

_PROGRAM = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


class Compilation:
    """What happened within :func:`watch_compilation`.

    Attributes:
      programs: that were compiled or read from the cache.
      hits: those that were read from it.
    """

    programs: int = 0
    hits: int = 0

    def __str__(self) -> str:
        """For people."""
        folder = jax.config.values["jax_compilation_cache_dir"]
        if folder is None:
            return "no compilation cache"
        return f"{'found' if self.hits else 'was not'} in the compilation cache {folder}"


@contextlib.contextmanager
def watch_compilation() -> Iterator[Compilation]:
    """Count the programs of the block."""
    found = Compilation()

    def on_event(event: str, **_: object) -> None:
        found.hits += event == _HIT

    def on_duration(event: str, duration_secs: float, **_: object) -> None:
        del duration_secs
        found.programs += event == _PROGRAM

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)
