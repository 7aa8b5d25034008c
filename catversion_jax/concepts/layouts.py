"""The layouts a list of concepts comes in, all ending in :class:`Entry`; here they are told apart.

| layout                            | recognised by                                            |
|-----------------------------------|----------------------------------------------------------|
| one folder of images              | images directly in the folder                            |
| folder of folders                 | none of the others                                       |
| kohya's project                   | ``img/`` with folders such as ``10_name``                |
| kohya's dataset file              | a ``.toml`` file                                         |
| DreamBench                        | ``prompts_and_classes.txt`` in it or in ``dataset/``     |
| manifest                          | a ``.yaml .yml .json .jsonl .csv`` file                  |
| the examples that ship            | the name ``tiny-sd-examples``                            |
| imagefolder, saved or hub dataset | ``metadata.*``, ``dataset_info.json``, ``hf:owner/name`` |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from catversion_jax.assets import embedded_folder
from catversion_jax.concepts.entries import CONCEPT_FILE, DREAMBENCH_FILE, Layout
from catversion_jax.concepts.folder_entries import folder_entry
from catversion_jax.concepts.folders import (
    children,
    holds_images,
    is_hidden,
    is_image_name,
    mask_folder_of,
)
from catversion_jax.concepts.kohya import (
    image_folder,
    is_regularisation,
    read_dataset_file,
    read_project,
)
from catversion_jax.concepts.manifests import MANIFEST_SUFFIXES, read_manifest
from catversion_jax.concepts.metadata import METADATA_FILES, read_metadata
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.concepts.user_paths import is_there, user_path
from catversion_jax.config.documents import read_text
from catversion_jax.errors import CatVersionError, ConceptError, encodable

_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "metadata.parquet")
_SPLIT_FOLDERS = ("train", "validation", "test")
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
    path = embedded_folder(source) or user_path(str(source), Path())
    columns = (dataset_split, image_column, concept_column, base_class_column)
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        return _hub_dataset(str(source), path, columns)
    listed = next((path / name for name in METADATA_FILES if is_there(path / name)), None)
    has_splits = any((path / name).is_dir() for name in _SPLIT_FOLDERS)
    if (
        listed is not None
        and (dataset_split, image_column) == ("train", "image")
        and not has_splits
    ):
        return read_metadata(path, listed, concept_column, base_class_column)
    if listed is not None or any((path / name).is_file() for name in _DATASET_FILES):
        return _dataset(str(path), path.resolve().name, columns)
    for home in (path, path / "dataset"):
        if (home / DREAMBENCH_FILE).is_file():
            return read_dreambench(home)
    if concept_column or base_class_column:
        return _dataset(str(path), path.resolve().name, columns)
    if (repeated := image_folder(path)) is not None:
        return read_project(path, repeated)
    alone = holds_images(path) or (path / CONCEPT_FILE).is_file()
    return read_single_folder(path) if alone else read_folder_of_folders(path)


def _read_file(path: Path) -> Layout:
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return read_manifest(path)
    if path.suffix.lower() == ".toml":
        return read_dataset_file(path)
    hint = " Give the folder the image lies in." if is_image_name(path) else ""
    raise CatVersionError(
        f"{path}: is neither a folder nor a manifest ({', '.join(MANIFEST_SUFFIXES)}, or kohya's "
        f".toml).{hint}"
    )


def read_single_folder(folder: Path) -> Layout:
    """One flat folder of images, with an optional ``concept.json`` inside."""
    return Layout((folder_entry(folder, {}, home=f"{folder / CONCEPT_FILE}"),), single=True)


def read_folder_of_folders(folder: Path, classes: Mapping[str, str] | None = None) -> Layout:
    """Every visible sub-folder is a concept, but not masks and regularisation images; ``classes``
    gives base classes by folder name.
    """
    inside = [path for path in children(folder) if path.name != DREAMBENCH_FILE]
    subfolders: list[Path] = []
    skipped: list[str] = []
    for path in inside:
        if not path.is_dir():
            skipped.append(path.name)
        elif is_hidden(path.name):
            skipped.append(f"{path.name}/")
        elif is_regularisation(path.name):
            skipped.append(f"{path.name}/ (regularisation images, not used)")
        else:
            subfolders.append(path)
    masks = _parallel_masks(subfolders)
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
        known = classes is not None and path.name in classes
        given = {"base_class": classes[path.name]} if classes is not None and known else {}
        entries.append(folder_entry(path, given, home=home))
    return Layout(tuple(entries), tuple(map(encodable, skipped)))


def _parallel_masks(folders: Sequence[Path]) -> set[Path]:
    """Those of the folders that hold the masks of another."""
    masks = set()
    for folder in folders:
        try:
            with concept_errors(f"{folder}: cannot be read"):
                mask_folder = mask_folder_of(folder)
        except ConceptError:
            continue  # said when the folder itself is read
        if mask_folder is not None and mask_folder.parent == folder.parent:
            masks.add(mask_folder)
    return masks


def read_dreambench(folder: Path) -> Layout:
    """DreamBench as published: a folder per subject, ``subject_name,class`` lines in one text file.

    The file is prose around that table (google/dreambooth ``dataset/prompts_and_classes.txt``): the
    table begins after the line ``subject_name,class`` and ends at the first empty line.
    """
    file = folder / DREAMBENCH_FILE
    lines = [line.strip() for line in read_text(file).splitlines()]
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
