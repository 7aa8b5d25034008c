"""OneTrainer's list of concepts, ``concepts.json``.

Read are ``name``, ``path``, ``enabled``, ``include_subdirectories`` and the type of a concept;
masks are found by its habit ``<image>-masklabel.png``, captions by ``<image>.txt``. Its further
settings (crop jitter, balancing, seeds drawn at random) belong to its own training.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import Entry, Layout, quarantined_entry
from catversion_jax.concepts.folder_entries import with_concept_file
from catversion_jax.concepts.tables import Row
from catversion_jax.concepts.user_paths import folder_of
from catversion_jax.errors import CatVersionError, ConceptError, shown

_OWN_KEYS = ("base_class", "prompts", "prompt", "when", "mask_polarity", "random_flip")


def is_onetrainer(values: Mapping[str, Any]) -> bool:
    """Whether an entry is one of OneTrainer's."""
    return "include_subdirectories" in values or ("enabled" in values and "balancing" in values)


def read_onetrainer(path: Path, rows: Sequence[Row]) -> Layout:
    """Its enabled concepts. Validation sets and prior-preservation images are none.

    Raises:
      CatVersionError: all of them are left out.
    """
    entries: list[Entry] = []
    skipped: list[str] = []
    for row in rows:
        values = row.values if isinstance(row.values, Mapping) else {}
        name = _name(values)
        if reason := _left_out(values):
            skipped.append(f"{shown(name)[1:-1]} ({reason} in {path.name})")
            continue
        entries.append(
            quarantined_entry(name, row.where, path.parent, functools.partial(_entry, path, row))
        )
    if not entries:
        raise CatVersionError(f"{path}: no concept of it is used: {', '.join(skipped)}.")
    note = (
        f"{path.name} is a list of OneTrainer's; name, path, enabled and include_subdirectories "
        "are used, its other settings are not"
    )
    return Layout(tuple(entries), tuple(skipped), notes=(note,))


def _name(values: Mapping[str, Any]) -> str:
    name, folder = values.get("name"), values.get("path")
    if isinstance(name, str) and name.strip():
        return name
    return Path(folder.replace("\\", "/")).name if isinstance(folder, str) else ""


def _left_out(values: Mapping[str, Any]) -> str | None:
    if values.get("enabled") is False:
        return "not enabled"
    kind = values.get("type")
    if values.get("validation_concept") is True or kind == "VALIDATION":
        return "a validation set"
    return None if kind in (None, "STANDARD") else f"of type {shown(kind)}"


def _entry(path: Path, row: Row) -> Entry:
    if row.problem is not None or not isinstance(row.values, Mapping):
        raise ConceptError(row.problem or f"{row.where}: must be a mapping with name and path.")
    values, name = row.values, _name(row.values)
    where = f"{row.where} ({shown(name)[1:-1]})"
    folder_text = values.get("path")
    if not isinstance(folder_text, str) or not folder_text:
        raise ConceptError(f"{where}: has no path. Give the folder of its images.")
    folder = folder_of(folder_text, path.parent)
    entry = Entry(
        name,
        where,
        {key: values[key] for key in _OWN_KEYS if key in values},
        path.parent,
        (folder,),
        subfolders="included" if values.get("include_subdirectories") is True else "ignored",
        base_class_home=f"concept.json in {folder}",
    )
    return with_concept_file(entry, folder)
