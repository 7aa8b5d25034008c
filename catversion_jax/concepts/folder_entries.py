"""A folder of one concept, and the ``concept.json`` in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import CONCEPT_FILE, Entry, quarantined_entry
from catversion_jax.concepts.fields import PROMPT_KEYS
from catversion_jax.concepts.user_paths import is_there, user_path
from catversion_jax.config.documents import parse_json, read_text
from catversion_jax.errors import ConceptError, encodable, shown

_MAX_BYTES = 2**20
_PATHS = ("images", "masks", "eval_images")


def folder_entry(folder: Path, given: Mapping[str, Any], *, home: str) -> Entry:
    """A concept folder and its ``concept.json``, which overrides what the layout knows
    (``given``).
    """
    name = folder.resolve().name
    entry = Entry(name, encodable(str(folder)), given, folder, (folder,), base_class_home=home)
    return with_concept_file(entry, folder)


def listed_entry(entry: Entry, folder: Path) -> Entry:
    """``entry`` of a list, with what the ``concept.json`` of its folder says beside it; where both
    say something, the list wins.
    """
    own = with_concept_file(dataclasses.replace(entry, fields={}), folder)
    if own.problem is not None or not own.fields:
        return entry if own.problem is None else own
    given = {key: value for key, value in entry.fields.items() if value not in (None, "")}
    given |= {key: _complete(given[key], entry.root) for key in _PATHS if key in given}
    beside = {
        key: value
        for key, value in own.fields.items()
        if not (key in PROMPT_KEYS and any(one in given for one in PROMPT_KEYS))
    }
    return dataclasses.replace(
        own,
        name=entry.name,
        where=f"{entry.where}, {own.where}",
        fields={**beside, **given},
        folders=() if "images" in given else own.folders,
        base_class_home=f"{entry.base_class_home} or {own.where}",
    )


def _complete(value: Any, root: Path) -> Any:
    """A path of a list, or several, that means the same from any folder."""
    if isinstance(value, list):
        return [_complete(one, root) for one in value]
    if not isinstance(value, str):
        return value
    return "|".join(str(user_path(one.strip(), root).absolute()) for one in value.split("|"))


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
