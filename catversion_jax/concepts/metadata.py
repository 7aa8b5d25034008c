"""A folder of images with a list of them, ``metadata.jsonl`` or ``metadata.csv`` (Hugging Face's
imagefolder): a row has ``file_name``, and columns may name its concept, base class and caption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from catversion_jax.concepts.entries import Entry, Layout
from catversion_jax.concepts.folder_entries import with_concept_file
from catversion_jax.concepts.folders import ImageSource, list_images
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.concepts.tables import Row, read_rows
from catversion_jax.concepts.user_paths import user_path
from catversion_jax.errors import (
    CatVersionError,
    ConceptError,
    did_you_mean,
    encodable,
    listed,
    shown,
)

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"
_CAPTION_COLUMNS = ("text", "caption", "prompt")


def read_metadata(
    folder: Path, file: Path, concept_column: str | None, base_class_column: str | None
) -> Layout:
    """The concepts of a listed folder, in order of appearance; without a concept column it is one.

    Images that no row lists are noted. A row that names no image there is a problem of its concept.

    Raises:
      CatVersionError: the list cannot be read, or has no such column.
    """
    rows, notes = read_rows(file)
    columns = list(dict.fromkeys(key for row in rows for key in _values(row)))
    wanted = {"concept_column": concept_column, "base_class_column": base_class_column}
    for option, column in {**wanted, "images": _FILE}.items():
        if column is not None and column not in columns:
            there = shown(", ".join(map(str, columns)))[1:-1]
            raise CatVersionError(
                f"{file}: {option}={column!r}: no such column; there are {there}."
                f"{did_you_mean(column, map(str, columns))}"
            )
    known = _Known(folder)
    unlisted = _unlisted(known, rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = folder.resolve().name
        if concept_column is not None:
            value = _values(row).get(concept_column)
            name = f"row {row.number}" if value in (None, "") else str(value)
        groups.setdefault(name, []).append(row)
    entries = [
        _entry(known, file, name, members, concept_column, base_class_column, unlisted)
        for name, members in groups.items()
    ]
    return Layout(
        tuple(entries),
        single=concept_column is None,
        notes=(*notes, *_unlisted_note(file, unlisted)),
    )


def _values(row: Row) -> Mapping[str, object]:
    return row.values if isinstance(row.values, Mapping) else {}


class _Known:
    """The images of folders with their masks and captions; each folder is listed once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[Path, dict[Path, ImageSource]] = {}

    def images(self, folder: Path) -> dict[Path, ImageSource]:
        if folder not in self._listed:
            found = list_images(folder).images
            self._listed[folder] = {source.path: source for source in found if source.path}
        return self._listed[folder]


def _unlisted(known: _Known, rows: Sequence[Row]) -> list[str]:
    """Names of the images directly in the folder that no row names."""
    listed = {Path(str(_values(row).get(_FILE, "")).replace("\\", "/")).name for row in rows}
    images = known.images(known.folder).values()
    return [image.label for image in images if image.label not in listed]


def _unlisted_note(file: Path, unlisted: Sequence[str]) -> tuple[str, ...]:
    if not unlisted:
        return ()
    return (f"not listed in {file.name}, so not used: {', '.join(listed(unlisted, 10))}",)


def _entry(
    known: _Known,
    file: Path,
    name: str,
    rows: Sequence[Row],
    concept_column: str | None,
    base_class_column: str | None,
    unlisted: Sequence[str],
) -> Entry:
    home = f"column {base_class_column!r}" if base_class_column else "a base_class_column"
    where = f"{file} ({shown(name)[1:-1]})"
    entry = Entry(name, where, {}, known.folder, base_class_home=home)
    try:
        with concept_errors(f"{where}: cannot be read"):
            if concept_column is not None and name == f"row {rows[0].number}":
                _check(rows[0])
                raise ConceptError(
                    f"{rows[0].where}: column {concept_column!r}: has no concept name; fill it or "
                    "drop the row."
                )
            images = tuple(_image(known, row, unlisted) for row in rows)
            fields = _base_class(where, rows, base_class_column)
            entry = dataclasses.replace(entry, images=images, fields=fields)
            return with_concept_file(entry, known.folder) if concept_column is None else entry
    except ConceptError as error:
        return dataclasses.replace(entry, problem=str(error))


def _check(row: Row) -> None:
    if row.problem is not None:
        raise ConceptError(row.problem)
    if not isinstance(row.values, Mapping):
        raise ConceptError(f"{row.where}: {shown(row.values)}: must be a mapping with {_FILE}.")


def _image(known: _Known, row: Row, unlisted: Sequence[str]) -> ImageSource:
    """The image of a row, with its mask and its captions."""
    _check(row)
    name = row.values.get(_FILE)
    if not isinstance(name, str) or not name.strip():
        raise ConceptError(f"{row.where}: {_FILE}={shown(name)}: must be the name of an image.")
    path = user_path(name, known.folder)
    if not path.is_file():
        there = f" In the folder, but not listed: {', '.join(unlisted[:5])}." if unlisted else ""
        raise ConceptError(
            f"{row.where}: {_FILE} {shown(name)} not found in {known.folder}. Correct or drop the "
            f"row.{there}"
        )
    texts = [row.values.get(column) for column in _CAPTION_COLUMNS]
    caption = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    source = known.images(path.parent).get(path, ImageSource(encodable(path.name), path))
    return dataclasses.replace(source, caption=caption)


def _base_class(where: str, rows: Sequence[Row], column: str | None) -> dict[str, object]:
    words = list(dict.fromkeys(shown(row.values.get(column)) for row in rows)) if column else []
    if len(words) > 1:
        listed = ", ".join(sorted(words)[:5])
        raise ConceptError(
            f"{where}: its rows give different base classes: {listed}. A concept has one."
        )
    return {"base_class": rows[0].values.get(column)} if column else {}
