"""A concept as the user's files describe it, before anything is checked.

The readers of layouts return these values; :mod:`~catversion_jax.concepts.reading` checks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from catversion_jax.concepts.folders import ImageSource
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.errors import ConceptError

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
      folders: folders of its images; none when ``fields['images']`` or ``images`` lists them.
      mask_folders: of each of ``folders`` its parallel folder of masks, where it is known.
      subfolders: what sub-folders of images mean: that two concepts are mixed up, nothing, or more
        images of this one.
      images: the images themselves, when they come from a dataset.
      base_class_home: where a user would write the base class.
      problem: why the entry cannot be used, when the layout already knows.
      notes: remarks for the user.
    """

    name: str
    where: str
    fields: Mapping[str, Any]
    root: Path
    folders: tuple[Path, ...] = ()
    mask_folders: Mapping[Path, Path] = dataclasses.field(default_factory=dict)
    subfolders: Literal["refused", "ignored", "included"] = "refused"
    images: tuple[ImageSource, ...] | None = None
    base_class_home: str = CONCEPT_FILE
    problem: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """All entries of a source.

    Attributes:
      entries: its concepts.
      skipped: what belongs to no concept.
      single: whether the source is one concept by itself, not a list.
      notes: remarks on the source as a whole.
    """

    entries: tuple[Entry, ...]
    skipped: tuple[str, ...] = ()
    single: bool = False
    notes: tuple[str, ...] = ()


def quarantined_entry(name: str, where: str, root: Path, read: Callable[[], Entry]) -> Entry:
    """What ``read`` returns, or an entry with the problem of whatever it raises."""
    try:
        with concept_errors(f"{where}: cannot be read"):
            return read()
    except ConceptError as error:
        problem = str(error) if where in str(error) else f"{where}: {error}"
        return Entry(name, where, {}, root, problem=problem)
