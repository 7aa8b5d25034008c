"""A folder of one concept, and the ``concept.json`` in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import CONCEPT_FILE, Entry, quarantined_entry
from catversion_jax.concepts.user_paths import is_there
from catversion_jax.config.documents import parse_json, read_text
from catversion_jax.errors import ConceptError, encodable, shown

_MAX_BYTES = 2**20


def folder_entry(folder: Path, given: Mapping[str, Any], *, home: str) -> Entry:
    """A concept folder and its ``concept.json``, which overrides what the layout knows
    (``given``).
    """
    name = folder.resolve().name
    entry = Entry(name, encodable(str(folder)), given, folder, (folder,), base_class_home=home)
    return with_concept_file(entry, folder)


def with_concept_file(entry: Entry, folder: Path) -> Entry:
    """``entry`` with what the ``concept.json`` of its folder says, or with that file's problem."""
    return quarantined_entry(
        entry.name, entry.where, entry.root, lambda: _with_concept_file(entry, folder)
    )


def _with_concept_file(entry: Entry, folder: Path) -> Entry:
    file = folder / CONCEPT_FILE
    if not is_there(file):
        return entry
    own = parse_json(read_text(file, max_bytes=_MAX_BYTES), str(file))
    if not isinstance(own, dict):
        raise ConceptError(f'{file}: must hold {{"base_class": "..."}}, got {shown(own, 40)}.')
    if "path" in own:
        raise ConceptError(f"{file}: has no key 'path'; the images lie beside it.")
    if not isinstance(own.get("name"), str | int | None):
        raise ConceptError(f"{file}: name={shown(own['name'])}: must be text.")
    return dataclasses.replace(
        entry,
        name=str(own.get("name") or entry.name),
        where=str(file),
        fields={**entry.fields, **own},
        root=folder,
        folders=() if "images" in own else entry.folders,
    )
