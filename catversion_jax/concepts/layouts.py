"""The layouts a list of concepts comes in; one small function per layout, all ending in
:class:`Entry`.

| layout                            | recognised by                                            |
|-----------------------------------|----------------------------------------------------------|
| one folder of images              | images directly in the folder                            |
| folder of folders                 | none of the others                                       |
| DreamBench                        | ``prompts_and_classes.txt`` in it or in ``dataset/``     |
| manifest                          | a ``.yaml .yml .json .jsonl .csv`` file                  |
| Custom Diffusion's ``concepts_list.json`` | its entries have ``instance_data_dir``           |
| the examples that ship            | the name ``tiny-sd-examples``                            |
| imagefolder, saved or hub dataset | ``metadata.*``, ``dataset_info.json``, ``hf:owner/name`` |
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from catversion_jax.assets import embedded_folder
from catversion_jax.concepts.entries import CONCEPT_FILE, DREAMBENCH_FILE, Entry, Layout
from catversion_jax.concepts.folders import (
    children,
    holds_images,
    is_hidden,
    is_image_name,
    mask_folder_of,
)
from catversion_jax.errors import CatVersionError, ConceptError

MANIFEST_SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".csv")
_METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_EXTRA = "fields beyond the header"
_HUB_ID = re.compile(r"^(hf:)?(?P<id>[\w.-]+/[\w.-]+)$")


def read_entries(
    source: str | Path,
    *,
    dataset_split: str,
    image_column: str,
    concept_column: str | None,
    base_class_column: str | None,
) -> Layout:
    """Recognise the layout of ``source`` and read it.

    Raises:
      CatVersionError: not found, or not one of the layouts.
    """
    path = embedded_folder(source) or Path(source).expanduser()
    columns = (dataset_split, image_column, concept_column, base_class_column)
    if path.is_file():
        if path.suffix.lower() in MANIFEST_SUFFIXES:
            return read_manifest(path)
        hint = " Give the folder the image lies in." if is_image_name(path) else ""
        raise CatVersionError(
            f"{path}: is neither a folder nor a manifest ({', '.join(MANIFEST_SUFFIXES)}).{hint}"
        )
    if not path.is_dir():
        return _hub_dataset(str(source), path, columns)
    if any(
        (path / name).is_file()
        for name in ("dataset_info.json", "dataset_dict.json", *_METADATA_FILES)
    ):
        return _dataset(str(path), path.resolve().name, columns)
    for home in (path, path / "dataset"):
        if (home / DREAMBENCH_FILE).is_file():
            return read_dreambench(home)
    if concept_column or base_class_column:
        return _dataset(str(path), path.resolve().name, columns)
    alone = holds_images(path) or (path / CONCEPT_FILE).is_file()
    return read_single_folder(path) if alone else read_folder_of_folders(path)


def read_single_folder(folder: Path) -> Layout:
    """One flat folder of images, with an optional ``concept.json`` inside."""
    return Layout((_folder_entry(folder, {}, home=f"{folder / CONCEPT_FILE}"),), single=True)


def read_folder_of_folders(folder: Path, classes: Mapping[str, str] | None = None) -> Layout:
    """Every visible sub-folder is a concept; ``classes`` gives base classes by folder name."""
    subfolders = [path for path in children(folder) if path.is_dir() and not is_hidden(path.name)]
    skipped = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in children(folder)
        if path not in subfolders and path.name != DREAMBENCH_FILE
    ]
    parallel = [mask_folder_of(path) for path in subfolders]
    masks = [path for path in parallel if path is not None and path.parent == folder]
    concepts = [path for path in subfolders if path not in masks]
    if not concepts:
        found = f" (only {', '.join(skipped[:5])})" if skipped else ""
        raise CatVersionError(
            f"{folder}: no image and no folder of images in it{found}. Put 3 to 10 photos of one "
            "concept there, or one sub-folder per concept."
        )
    home = (
        f"its {CONCEPT_FILE}"
        if classes is None
        else f"{folder / DREAMBENCH_FILE} or its {CONCEPT_FILE}"
    )
    entries = []
    for path in concepts:
        given = (
            {}
            if classes is None or path.name not in classes
            else {"base_class": classes[path.name]}
        )
        entries.append(_folder_entry(path, given, home=home))
    return Layout(tuple(entries), tuple(skipped))


def read_dreambench(folder: Path) -> Layout:
    """DreamBench as published: a folder per subject, ``subject_name,class`` lines in one text file.

    The file is prose around that table (google/dreambooth ``dataset/prompts_and_classes.txt``): the
    table begins after the line ``subject_name,class`` and ends at the first empty line.
    """
    file = folder / DREAMBENCH_FILE
    lines = [line.strip() for line in _read_text(file).splitlines()]
    header = next(
        (i for i, line in enumerate(lines) if line.replace(" ", "") == "subject_name,class"), None
    )
    if header is None:
        raise CatVersionError(
            f"{file}: has no line 'subject_name,class' before the list of subjects."
        )
    classes: dict[str, str] = {}
    for line in lines[header + 1 :]:
        if not line:
            if classes:
                break
            continue
        subject, comma, word = line.partition(",")
        if not comma or not subject.strip() or not word.strip():
            raise CatVersionError(
                f"{file}: {line!r}: a line of the list must be 'subject_name,class'."
            )
        classes[subject.strip()] = word.strip()
    layout = read_folder_of_folders(folder, classes)
    absent = sorted(set(classes) - {entry.name for entry in layout.entries})
    missing = (
        (f"{len(absent)} subjects of {file.name} without a folder: {', '.join(absent)}",)
        if absent
        else ()
    )
    return dataclasses.replace(layout, skipped=layout.skipped + missing)


def read_manifest(path: Path) -> Layout:
    """A list of concepts in a file: YAML, JSON, JSON lines or CSV; paths relative to the file."""
    rows = _manifest_rows(path)
    if not rows:
        raise CatVersionError(f"{path}: lists no concept. An entry is name, path and base_class.")
    not_mappings = [row for _, row in rows if not isinstance(row, Mapping)]
    if not_mappings:
        nested = (
            " For two-concept lists such as dataset_multiconcept.json, use the single-concept list."
        )
        hint = nested if isinstance(not_mappings[0], list) else ""
        raise CatVersionError(
            f"{path}: {str(not_mappings[0])[:60]!r}: every entry must be a mapping with name, "
            f"path, base_class.{hint}"
        )
    custom_diffusion = any("instance_data_dir" in row for _, row in rows)
    read_row = _custom_diffusion_entry if custom_diffusion else _manifest_entry
    return Layout(tuple(read_row(path, where, dict(row)) for where, row in rows))


def _manifest_rows(path: Path) -> list[tuple[str, Any]]:
    """``(where, row)`` of every entry, before any is understood."""
    text = _read_text(path)
    kind = path.suffix.lower()
    try:
        if kind == ".csv":
            return _csv_rows(path, text)
        if kind == ".jsonl":
            lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
            return [(f"{path} line {i}", json.loads(line)) for i, line in lines]
        value = yaml.safe_load(text) if kind in (".yaml", ".yml") else json.loads(text)
    except (json.JSONDecodeError, yaml.YAMLError, csv.Error) as error:
        raise CatVersionError(f"{path}: is not valid {kind[1:].upper()}: {error}") from None
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
    return [(f"{path} entry {i}", row) for i, row in enumerate(value, 1)]


def _csv_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_EXTRA, skipinitialspace=True)
    rows: list[tuple[str, Any]] = []
    for row in reader:
        where = f"{path} line {reader.line_num}"
        if _EXTRA in row:
            raise CatVersionError(
                f"{where}: more fields than the header has. Quote texts that contain a comma."
            )
        rows.append((where, row))
    return rows


def _manifest_entry(path: Path, where: str, row: dict[str, Any]) -> Entry:
    folder_text, files = row.get("path"), row.get("images")
    name = row.get("name")
    if name in (None, ""):
        name = Path(str(folder_text)).name if folder_text else ""
    entry = Entry(str(name), f"{where} ({name})", row, path.parent, base_class_home=str(path))
    if not folder_text and not files:
        return dataclasses.replace(
            entry, problem=f"{entry.where}: has no path. Give the folder of its images."
        )
    if not folder_text:
        return entry
    if not isinstance(folder_text, str):
        return dataclasses.replace(
            entry, problem=f"{entry.where}: path={folder_text!r}: must be text."
        )
    folder = path.parent / Path(folder_text).expanduser()
    if files:
        return dataclasses.replace(entry, root=folder)
    if folder.is_file():
        return dataclasses.replace(entry, fields={**row, "images": [folder_text]})
    if not folder.is_dir():
        problem = (
            f"{entry.where}: path {folder_text!r} not found. It is looked for relative to "
            f"{path.parent}."
        )
        return dataclasses.replace(entry, problem=problem)
    return dataclasses.replace(entry, folder=folder)


def _custom_diffusion_entry(path: Path, where: str, row: dict[str, Any]) -> Entry:
    """One entry of Custom Diffusion's list (also CustomConcept101's ``dataset.json``).

    The base class is ``class_prompt`` and the prompt ``instance_prompt``, both without their
    ``<newN>``. Their own scripts resolve paths from the working directory, so that is tried after
    the file's folder.
    """
    folder_text = row.pop("instance_data_dir", None)
    name = str(row.pop("name", "") or Path(str(folder_text or "")).name)
    where = f"{where} ({name})"
    for key in ("class_data_dir", "prompt_filename"):
        # class images and evaluation prompts: not used here
        row.pop(key, None)
    class_prompt = _without_new_tokens(row.pop("class_prompt", None))
    if class_prompt:
        row["base_class"] = class_prompt
    if prompt := _without_new_tokens(row.pop("instance_prompt", None)):
        row["instance_prompt"] = prompt
    entry = Entry(name, where, row, path.parent, base_class_home=f"{path} as class_prompt")
    if not isinstance(folder_text, str) or not folder_text:
        return dataclasses.replace(
            entry, problem=f"{where}: has no instance_data_dir, the folder of its images."
        )
    if isinstance(class_prompt, str) and class_prompt.endswith(".txt"):
        problem = (
            f"{where}: class_prompt={class_prompt!r} is a file of captions; give the class words."
        )
        return dataclasses.replace(entry, problem=problem)
    tried = [path.parent / Path(folder_text).expanduser(), Path(folder_text).expanduser()]
    folder = next((candidate for candidate in tried if candidate.is_dir()), None)
    if folder is None:
        problem = (
            f"{where}: instance_data_dir not found: neither {tried[0]} nor {tried[1]} is a folder."
        )
        return dataclasses.replace(entry, problem=problem)
    return dataclasses.replace(entry, folder=folder)


def _without_new_tokens(text: Any) -> Any:
    return " ".join(re.sub(r"<[^<>\s]+>", " ", text).split()) if isinstance(text, str) else text


def _folder_entry(folder: Path, given: Mapping[str, Any], *, home: str) -> Entry:
    """A concept folder and its ``concept.json``, which overrides what the layout knows
    (``given``).
    """
    file = folder / CONCEPT_FILE
    name = folder.resolve().name
    entry = Entry(name, str(folder), given, folder, folder, base_class_home=home)
    if not file.is_file():
        return entry
    try:
        own = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        return dataclasses.replace(entry, problem=f"{file}: is not valid JSON: {error}")
    except CatVersionError as error:
        return dataclasses.replace(entry, problem=str(error))
    if not isinstance(own, dict):
        return dataclasses.replace(
            entry, problem=f'{file}: must hold {{"base_class": "..."}}, got {own!r:.40}.'
        )
    fields = {**given, **own}
    images_listed = "images" in own
    return dataclasses.replace(
        entry,
        name=str(own.get("name") or name),
        where=str(file),
        fields={k: v for k, v in fields.items() if k != "path"},
        folder=None if images_listed else folder,
        problem=f"{file}: has no key 'path'; the images lie beside it." if "path" in own else None,
    )


def _hub_dataset(
    source: str, path: Path, columns: tuple[str, str, str | None, str | None]
) -> Layout:
    match = _HUB_ID.match(source)
    if match and (source.startswith("hf:") or columns[2] or columns[3]):
        return _dataset(match["id"], match["id"].split("/")[1], columns)
    hub = " A Hugging Face dataset is written hf:owner/name." if match else ""
    raise CatVersionError(
        f"{path}: not found. Give a folder of images, a folder of folders, or a manifest.{hub}"
    )


def _dataset(source: str, name: str, columns: tuple[str, str, str | None, str | None]) -> Layout:
    from catversion_jax.concepts.datasets import read_dataset  # `datasets` takes seconds to import

    return read_dataset(source, name, *columns)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConceptError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise ConceptError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
