"""A concept as the user's files describe it, before anything is checked.

The readers of :mod:`~catversion_jax.concepts.layouts` and :mod:`~catversion_jax.concepts.datasets`
return these values; :mod:`~catversion_jax.concepts.reading` checks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.concepts.folders import ImageSource

CONCEPT_FILE = "concept.json"
DREAMBENCH_FILE = "prompts_and_classes.txt"
CONCEPT_FILES = (CONCEPT_FILE, DREAMBENCH_FILE)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One concept as its layout wrote it down, nothing checked yet.

    Attributes:
      name: wanted concept name.
      where: the file or folder to name in messages.
      fields: the keys the user wrote.
      root: what relative paths in ``fields`` are relative to.
      folder: folder of its images, or None when ``fields['images']`` or ``images`` lists them.
      images: the images themselves, when they come from a dataset.
      base_class_home: where a user would write the base class.
      problem: why the entry cannot be used, when the layout already knows.
      notes: remarks for the user.
    """

    name: str
    where: str
    fields: Mapping[str, Any]
    root: Path
    folder: Path | None = None
    images: tuple[ImageSource, ...] | None = None
    base_class_home: str = CONCEPT_FILE
    problem: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """All entries of a source. ``single`` means the source is one concept by itself, not a list."""

    entries: tuple[Entry, ...]
    skipped: tuple[str, ...] = ()
    single: bool = False
