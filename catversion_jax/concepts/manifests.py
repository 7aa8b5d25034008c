"""A list of concepts in a file: YAML, JSON, JSON lines or CSV; paths relative to the file.

| list                                      | recognised by                                    |
|-------------------------------------------|--------------------------------------------------|
| Custom Diffusion's ``concepts_list.json`` | its entries have ``instance_data_dir``           |
| OneTrainer's ``concepts.json``            | its entries have ``include_subdirectories``      |
| our own                                   | none of the others                               |
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import Entry, Layout, quarantined_entry
from catversion_jax.concepts.folder_entries import listed_entry
from catversion_jax.concepts.names import with_sound_names
from catversion_jax.concepts.onetrainer import is_onetrainer, read_onetrainer
from catversion_jax.concepts.tables import Row, Table, read_rows
from catversion_jax.concepts.user_paths import folder_of, user_path
from catversion_jax.config.documents import parse_json, parse_yaml, read_text
from catversion_jax.errors import CatVersionError, ConceptError, shown

MANIFEST_SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".csv")


def read_manifest(path: Path) -> Layout:
    """The concepts of a list.

    Raises:
      CatVersionError: the file as a whole cannot be understood, or lists nothing.
    """
    rows, notes = _rows(path)
    if not rows:
        raise CatVersionError(f"{path}: lists no concept. An entry is name, path and base_class.")
    mappings = [row.values for row in rows if isinstance(row.values, Mapping)]
    if any(is_onetrainer(values) for values in mappings):
        return read_onetrainer(path, rows)
    custom_diffusion = any("instance_data_dir" in values for values in mappings)
    entries = [_entry(path, row, custom_diffusion=custom_diffusion) for row in rows]
    return Layout(tuple(entries), notes=notes)


def _entry(path: Path, row: Row, *, custom_diffusion: bool) -> Entry:
    read = _custom_diffusion_entry if custom_diffusion else _plain_entry
    return quarantined_entry(
        _name_of(row), row.where, path.parent, functools.partial(read, path, row)
    )


class LongManifest:
    """A long list in a ``.csv`` or ``.jsonl`` file, of which only the names are known; an entry is
    understood when it is asked for.

    Attributes:
      names: of the concepts, each the name of a folder, in order.
      notes: on the file as a whole.

    Raises:
      CatVersionError: the file as a whole cannot be understood, or two concepts share a folder.
    """

    def __init__(self, path: Path, table: Table):
        self._path, self._table, self.notes = path, table, table.notes
        self._custom_diffusion = False
        self.names = [entry.name for entry in with_sound_names(self._only_names())]
        self._places = {name: place for place, name in enumerate(self.names)}

    @classmethod
    def of(cls, path: Path, at_least: int) -> LongManifest | None:
        """The list at ``path``, unless it is shorter than ``at_least`` or of another kind."""
        if path.suffix.lower() not in (".csv", ".jsonl") or not path.is_file():
            return None
        table = Table(path)
        if len(table) < at_least:
            return None
        first = table[0].values
        if isinstance(first, Mapping) and is_onetrainer(first):
            return None
        return cls(path, table)

    def _only_names(self) -> Iterator[Entry]:
        for row in self._table:
            if isinstance(row.values, Mapping) and "instance_data_dir" in row.values:
                self._custom_diffusion = True
            yield Entry(_name_of(row), row.where, {}, self._path.parent, problem=row.problem)

    def entry(self, name: str) -> Entry:
        """What the list says of a concept."""
        row = self._table[self._places[name]]
        read = _entry(self._path, row, custom_diffusion=self._custom_diffusion)
        (sound,) = with_sound_names([read])
        return dataclasses.replace(sound, name=name)


def _rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """Every entry, before any is understood, and notes on the file."""
    kind = path.suffix.lower()
    if kind in (".csv", ".jsonl"):
        return read_rows(path)
    parse = parse_yaml if kind in (".yaml", ".yml") else parse_json
    value = parse(read_text(path), str(path))
    if isinstance(value, Mapping) and isinstance(value.get("concepts"), list):
        value = value["concepts"]
    if (
        isinstance(value, Mapping)
        and value
        and all(isinstance(row, Mapping) for row in value.values())
    ):
        value = [{"name": name, **row} for name, row in value.items()]
    if not isinstance(value, list):
        raise CatVersionError(
            f"{path}: must hold a list of concepts, each with name, path and base_class."
        )
    return [Row(f"{path} entry {i}", i, row) for i, row in enumerate(value, 1)], ()


def _name_of(row: Row) -> str:
    """The name that a row gives its concept, whatever else is wrong with it."""
    values = row.values if isinstance(row.values, Mapping) else {}
    for key in ("name", "path", "instance_data_dir"):
        if isinstance(value := values.get(key), str) and value.strip():
            return value if key == "name" else Path(value.replace("\\", "/")).name
    return ""


def _values_of(path: Path, row: Row) -> dict[str, Any]:
    """The keys and values of a row.

    Raises:
      ConceptError: it could not be read, or is something else.
    """
    if row.problem is not None:
        raise ConceptError(row.problem)
    if isinstance(row.values, Mapping):
        return dict(row.values)
    nested = (
        " For two-concept lists such as dataset_multiconcept.json, use the single-concept list."
    )
    raise ConceptError(
        f"{row.where}: {shown(row.values, 60)}: every entry must be a mapping with name, path, "
        f"base_class.{nested if isinstance(row.values, list) else ''}"
    )


def _plain_entry(path: Path, row: Row) -> Entry:
    """One entry of our own list.

    Raises:
      ConceptError: it names no images, or their folder is not there.
    """
    values = _values_of(path, row)
    name = values.get("name")
    if not isinstance(name, str | int | None):
        raise ConceptError(f"{row.where}: name={shown(name)}: must be text.")
    name = _name_of(row) if name in (None, "") else str(name)
    where = f"{row.where} ({shown(name)[1:-1]})"
    folder_text, files = values.get("path"), values.get("images")
    home = str(path)
    if not folder_text:
        if not files:
            raise ConceptError(f"{where}: has no path. Give the folder of its images.")
        return Entry(name, where, values, path.parent, base_class_home=home)
    if not isinstance(folder_text, str):
        raise ConceptError(f"{where}: path={shown(folder_text)}: must be text.")
    folder = user_path(folder_text, path.parent)
    if files:
        return listed_entry(Entry(name, where, values, folder, base_class_home=home), folder)
    if folder.is_file():
        values["images"] = [folder_text]
        return Entry(name, where, values, path.parent, base_class_home=home)
    if not folder.is_dir():
        raise ConceptError(
            f"{where}: path {shown(folder_text)} not found. It is looked for relative to "
            f"{path.parent}."
        )
    entry = Entry(name, where, values, path.parent, (folder,), base_class_home=home)
    return listed_entry(entry, folder)


def _custom_diffusion_entry(path: Path, row: Row) -> Entry:
    """One entry of Custom Diffusion's list (also CustomConcept101's ``dataset.json``).

    The base class is ``class_prompt`` and the prompt ``instance_prompt``, both without their
    ``<newN>``. Their own scripts resolve paths from the working directory, so that is tried after
    the file's folder.

    Raises:
      ConceptError: its folder is not given or not there, or its class words are a file.
    """
    values = _values_of(path, row)
    folder_text = values.pop("instance_data_dir", None)
    name = str(values.pop("name", "") or _name_of(row))
    where = f"{row.where} ({shown(name)[1:-1]})"
    for key in ("class_data_dir", "prompt_filename"):
        # class images and evaluation prompts: not used here
        values.pop(key, None)
    class_prompt = _without_new_tokens(values.pop("class_prompt", None))
    if class_prompt:
        values["base_class"] = class_prompt
    if prompt := _without_new_tokens(values.pop("instance_prompt", None)):
        values["instance_prompt"] = prompt
    if not isinstance(folder_text, str) or not folder_text:
        raise ConceptError(f"{where}: has no instance_data_dir, the folder of its images.")
    if isinstance(class_prompt, str) and class_prompt.endswith(".txt"):
        raise ConceptError(
            f"{where}: class_prompt={class_prompt!r} is a file of captions; give the class words."
        )
    folder = folder_of(folder_text, path.parent)
    home = f"{path} as class_prompt"
    entry = Entry(name, where, values, path.parent, (folder,), base_class_home=home)
    return listed_entry(entry, folder)


def _without_new_tokens(text: Any) -> Any:
    return " ".join(re.sub(r"<[^<>\s]+>", " ", text).split()) if isinstance(text, str) else text
