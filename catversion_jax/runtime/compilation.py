"""The persistent compilation cache: where it is, and what was found in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring

from catversion_jax.runtime.atomic_files import make_folder

_PROGRAM = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


def use_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs in ``folder``, so that the next process reads them instead.

    Args:
      folder: a folder, which is created, or a URL that JAX can write to, such as ``gs://...``.
        None leaves JAX as it is configured.

    Raises:
      CatVersionError: the folder cannot be created.
    """
    if folder is None:
        return
    if "://" not in folder:
        folder = str(Path(folder).expanduser())
        make_folder(Path(folder))
    jax.config.update("jax_compilation_cache_dir", folder)


class Compilation:
    """What happened within :func:`watch_compilation`.

    Attributes:
      programs: how many programs were compiled or read from the cache.
      hits: how many of them were read from the cache.
    """

    programs: int = 0
    hits: int = 0

    def __str__(self) -> str:
        """Say whether programs were found in the cache, and in which folder it is."""
        folder = jax.config.values["jax_compilation_cache_dir"]
        if folder is None:
            return "no compilation cache"
        return f"{'found' if self.hits else 'was not'} in the compilation cache {folder}"


@contextlib.contextmanager
def watch_compilation() -> Iterator[Compilation]:
    """Count the programs that are compiled while the block runs."""
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
