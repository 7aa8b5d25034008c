"""The persistent compilation cache: where it is, and what was found in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.atomic_files import check_writable, make_folder
from catversion_jax.runtime.bucket_paths import home_expanded

logger = logging.getLogger(__name__)

WORTH_KEEPING_SECONDS = 0.05
"""A program that is compiled in less is compiled again."""
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
PROGRAM = "/jax/core/compile/backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"
"""JAX's events: a program was compiled or read; it was found in the cache."""


def use_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs in ``folder``, so that the next process reads them instead.

    Args:
      folder: a folder, which is created, or a URL that JAX can write to, such as ``gs://...``.
        None leaves JAX as it is configured. One in a home folder (``~``) that cannot be written is
        done without, which is logged: services and containers often have no home folder.

    Raises:
      CatVersionError: another folder cannot be created or written.
    """
    if folder is None:
        return
    if "://" not in folder:
        try:
            folder = str(_writable(folder))
        except CatVersionError as error:
            if not folder.startswith("~"):
                raise
            logger.warning("no compilation cache, so every start compiles anew: %s", error)
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    # A start compiles dozens of small programs; JAX's own limit is a second.
    seconds = min(WORTH_KEEPING_SECONDS, jax.config.values[_LEAST_SECONDS])
    jax.config.update(_LEAST_SECONDS, seconds)


def _writable(folder: str) -> Path:
    path = home_expanded(folder)
    make_folder(path)
    check_writable(path)
    return path


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
        found.hits += event == FOUND

    def on_duration(event: str, duration_secs: float, **_: object) -> None:
        del duration_secs
        found.programs += event == PROGRAM

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)
