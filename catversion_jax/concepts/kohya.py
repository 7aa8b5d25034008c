"""kohya's two ways to say what is trained: a project folder, and a dataset file in TOML.

    project/img/10_rex teapot/1.png   10 repeats of the concept "rex teapot"
    project/reg/1_teapot/...          regularisation images, which are not used here
    project/log/, project/model/      its outputs

kohya trains a word that is new ("rex") before the class; here the class word itself calls the
concept, so the base class has to be said, and the concept is named after all of it.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import Entry, Layout, quarantined_entry
from catversion_jax.concepts.folder_entries import with_concept_file
from catversion_jax.concepts.folders import children, is_hidden
from catversion_jax.concepts.user_paths import folder_of
from catversion_jax.config.documents import read_text
from catversion_jax.errors import CatVersionError, ConceptError, shown

_REPEATED = re.compile(r"^\d+_(?P<name>.*\S.*)$")
_IMAGES = "img"
_REGULARISATION = re.compile(r"^(reg|regs|regulari[sz]ation)([ _-].*)?$", re.IGNORECASE)
_READ_KEYS = frozenset(
    {"image_dir", "class_tokens", "num_repeats", "is_reg", "conditioning_data_dir"}
)


def is_regularisation(name: str) -> bool:
    """Whether a folder is named as one of regularisation images."""
    return bool(_REGULARISATION.match(name))


def image_folder(folder: Path) -> Path | None:
    """The folder of ``10_name`` folders, when ``folder`` is a project of kohya's or its ``img``."""
    for home in (folder / _IMAGES, folder):
        if home.name.casefold() == _IMAGES and home.is_dir():
            inside = [path for path in children(home) if path.is_dir() and not is_hidden(path.name)]
            if inside and all(_REPEATED.match(path.name) for path in inside):
                return home
    return None


def read_project(folder: Path, images: Path) -> Layout:
    """Every ``10_name`` folder of ``images`` is a concept of that name, whatever the number."""
    entries = []
    for path in children(images):
        match = _REPEATED.match(path.name)
        if match is None or not path.is_dir():
            continue
        name = match["name"].strip()
        home = f"{path / 'concept.json'}"
        entry = Entry(name, str(path), {}, path, (path,), base_class_home=home)
        entries.append(with_concept_file(entry, path))
    skipped = []
    if images != folder:
        for path in children(folder):
            if path != images and not is_hidden(path.name):
                is_reg = path.is_dir() and is_regularisation(path.name)
                slash = "/" if path.is_dir() else ""
                skipped.append(
                    path.name + slash + (" (regularisation images, not used)" if is_reg else "")
                )
    note = f"{images} is laid out for kohya's scripts; the numbers of repeats are not used"
    return Layout(tuple(entries), tuple(skipped), notes=(note,))


def read_dataset_file(path: Path) -> Layout:
    """Kohya's dataset file. Subsets of one ``class_tokens`` are one concept.

    Raises:
      CatVersionError: it is no such file, or names no concept.
    """
    try:
        content = tomllib.loads(read_text(path))
    # tomllib has no bound on depth or digits: RecursionError and ValueError among others
    except CatVersionError:
        raise
    except Exception as error:
        raise CatVersionError(f"{path}: is not valid TOML: {shown(error)}") from None
    names: dict[str, list[Mapping[str, Any]]] = {}
    skipped: list[str] = []
    unused: set[str] = set(content.get("general", {}) if "general" in content else ())
    for dataset, subset in _subsets(content, path):
        unused |= {*subset, *dataset} - _READ_KEYS - {"subsets"}
        image_dir = subset.get("image_dir")
        if subset.get("is_reg") is True:
            skipped.append(f"{shown(image_dir)[1:-1]} (regularisation images, not used)")
            continue
        names.setdefault(_subset_name(subset), []).append(subset)
    if not names:
        raise CatVersionError(
            f"{path}: names no images to train on. It needs [[datasets.subsets]] with image_dir "
            f"and class_tokens, not all of them is_reg.{' Skipped: ' if skipped else ''}"
            f"{', '.join(skipped)}"
        )
    entries = [
        quarantined_entry(
            name, f"{path} ({name})", path.parent, functools.partial(_entry, path, name, subsets)
        )
        for name, subsets in names.items()
    ]
    note = (
        f"{path.name} is kohya's: image_dir, class_tokens, is_reg and conditioning_data_dir count"
    )
    if unused:
        note += f"; without effect here: {shown(', '.join(sorted(unused)))[1:-1]}"
    return Layout(tuple(entries), tuple(skipped), notes=(note,))


def _subsets(
    content: Mapping[str, Any], path: Path
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every subset with its dataset.

    Raises:
      CatVersionError: tables are not where kohya has them.
    """
    datasets = content.get("datasets")
    for dataset in datasets if isinstance(datasets, list) else [{}]:
        dataset = dataset if isinstance(dataset, Mapping) else {}
        subsets = dataset.get("subsets")
        if not isinstance(subsets, list) or not all(isinstance(s, Mapping) for s in subsets):
            raise CatVersionError(
                f"{path}: is no dataset file of kohya's: it must have [[datasets]] with "
                "[[datasets.subsets]]."
            )
        for subset in subsets:
            yield dataset, subset


def _subset_name(subset: Mapping[str, Any]) -> str:
    words, folder = subset.get("class_tokens"), subset.get("image_dir")
    if isinstance(words, str) and words.strip():
        return " ".join(words.split())
    if not isinstance(folder, str):
        return ""
    name = Path(folder.replace("\\", "/")).name
    match = _REPEATED.match(name)
    return match["name"].strip() if match else name


def _entry(path: Path, name: str, subsets: list[Mapping[str, Any]]) -> Entry:
    folders: list[Path] = []
    masks: dict[Path, Path] = {}
    for subset in subsets:
        image_dir, mask_dir = subset.get("image_dir"), subset.get("conditioning_data_dir")
        if not isinstance(image_dir, str) or not image_dir:
            raise ConceptError(f"{path} ({name}): a subset has no image_dir, the folder of images.")
        folder = folder_of(image_dir, path.parent)
        if folder not in folders:
            folders.append(folder)
        if mask_dir is not None:
            if not isinstance(mask_dir, str):
                raise ConceptError(
                    f"{path} ({name}): conditioning_data_dir={shown(mask_dir)}: must be text."
                )
            masks[folder] = folder_of(mask_dir, path.parent)
    home = f"concept.json in {folders[0]}"
    entry = Entry(
        name, f"{path} ({name})", {}, path.parent, tuple(folders), masks, base_class_home=home
    )
    return with_concept_file(entry, folders[0])
