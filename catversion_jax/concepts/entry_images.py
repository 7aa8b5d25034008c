"""Which images a concept has: all of its folders, those that a list names, or rows of a dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import CONCEPT_FILES, Entry
from catversion_jax.concepts.folders import (
    FolderImages,
    ImageSource,
    eval_folder_of,
    is_hidden,
    is_mask_name,
    list_images,
    mask_folder_of,
)
from catversion_jax.concepts.held_out import eval_folder, folder_photos, listed_names, without
from catversion_jax.concepts.user_paths import user_path
from catversion_jax.errors import ConceptError, encodable, listed, shown


def images_of(
    entry: Entry,
    fields: Mapping[str, Any],
    list_folder: Callable[[Path], FolderImages] = list_images,
) -> FolderImages:
    """The images of a concept, each with its mask and caption, those it holds out from training,
    and what else was there.

    Args:
      entry: the concept.
      fields: its known keys.
      list_folder: lists a folder that listed images lie in; many concepts may lie in one.

    Raises:
      ConceptError: there are none, or files or folders that it names are not there.
    """
    if entry.images is not None:
        found = FolderImages(entry.images)
    elif not entry.folders:
        found = FolderImages(_listed_images(entry, fields, list_folder))
    else:
        found = _merged([_folder_images(path, entry, fields) for path in entry.folders], entry)
    if entry.folders and not found.images:
        raise ConceptError(
            f"{entry.folders[0]}: no image in it{_what_was_there(found.skipped)}. Put 3 to 10 "
            "photos of the concept there."
        )
    images, of_training = _without_masks(found.images, entry)
    held_out, of_held_out = _without_masks(_held_out(entry, fields, images, list_folder), entry)
    left = without(images, held_out, entry.where)
    warnings = (*found.warnings, *of_training, *of_held_out)
    return dataclasses.replace(found, images=left, warnings=warnings, held_out=held_out)


def _without_masks(
    images: tuple[ImageSource, ...], entry: Entry
) -> tuple[tuple[ImageSource, ...], tuple[str, ...]]:
    """The photos among ``images``, and a warning where a list names masks too, as ``*.png`` does.

    Raises:
      ConceptError: no photo is left, or one is its own mask.
    """
    for source in images:
        if source.path and source.mask and os.path.samefile(source.path, source.mask):
            raise ConceptError(
                f"{entry.where}: {source.label}: is given as its own mask. Give the file of its "
                "mask, or none."
            )
    masks = {source.mask.resolve() for source in images if source.mask is not None}
    left = tuple(
        source
        for source in images
        if source.path is None
        or not (is_mask_name(source.path) or (masks and source.path.resolve() in masks))
    )
    if len(left) == len(images):
        return images, ()
    names = ", ".join(listed([source.label for source in images if source not in left]))
    if not left:
        raise ConceptError(
            f"{entry.where}: {names}: by their names these are masks, and no photo is listed. Name "
            "the photos, or rename these."
        )
    return left, (f"not used as photos, since they are masks by their names: {names}",)


def _held_out(
    entry: Entry,
    fields: Mapping[str, Any],
    images: Sequence[ImageSource],
    list_folder: Callable[[Path], FolderImages],
) -> tuple[ImageSource, ...]:
    """The photos that ``eval_images`` names, or that lie in a folder of that name."""
    if "eval_images" in fields:
        if (folder := eval_folder(entry, fields)) is not None:
            return folder_photos(folder, entry)
        files = _listed_files(listed_names(fields["eval_images"]), entry, "eval_images")
        known = {s.path.resolve(): s for s in images if s.path is not None}
        beside = zip(files, _beside(files, list_folder), strict=True)
        return tuple(known.get(file.resolve(), source) for file, source in beside)
    folders = [path for home in entry.folders if (path := eval_folder_of(home)) is not None]
    return tuple(source for path in folders for source in folder_photos(path, entry))


def _folder_images(folder: Path, entry: Entry, fields: Mapping[str, Any]) -> FolderImages:
    mask_folder = entry.mask_folders.get(folder)
    if "masks" in fields:
        text = fields["masks"]
        mask_folder = user_path(text, entry.root) if isinstance(text, str) else None
        if mask_folder is None or not mask_folder.is_dir():
            raise ConceptError(
                f"{entry.where}: masks={shown(text)}: must be a folder (relative to "
                f"{entry.root}) with one mask per image, of the same file stem."
            )
    if mask_folder is not None and os.path.samefile(folder, mask_folder):
        raise ConceptError(
            f"{entry.where}: {mask_folder}: is the folder of the images itself, so each would be "
            "its own mask. Give the masks a folder, or name them x.mask.png."
        )
    found = list_images(
        folder,
        mask_folder=mask_folder,
        eval_folder=eval_folder(entry, fields),
        ignore=CONCEPT_FILES,
    )
    if entry.subfolders == "included":
        return _with_subfolders(folder, found)
    if found.nested and entry.subfolders == "refused":
        raise ConceptError(
            f"{folder}: has images and also sub-folders of images "
            f"({', '.join(path.name for path in found.nested)}). Move the sub-folders out, or give "
            "each concept a folder of its own; masks go into a sub-folder named masks, photos that "
            "are held out from training into one named eval_images."
        )
    nested = tuple(f"{encodable(path.name)}/" for path in found.nested)
    return dataclasses.replace(found, nested=(), skipped=(*found.skipped, *nested))


def _with_subfolders(folder: Path, found: FolderImages) -> FolderImages:
    """The images of ``folder`` and of every visible folder in it, at any depth; no link is
    followed.
    """
    images, warnings = list(found.images), list(found.warnings)
    for home, names, _ in os.walk(folder):
        apart = (mask_folder_of(Path(home)), eval_folder_of(Path(home)))
        names[:] = sorted(n for n in names if not is_hidden(n) and Path(home, n) not in apart)
        if Path(home) == folder:
            continue
        inside = list_images(Path(home))
        below = encodable(str(Path(home).relative_to(folder)))
        images += [
            dataclasses.replace(source, label=f"{below}/{source.label}") for source in inside.images
        ]
        warnings += inside.warnings
    return FolderImages(tuple(images), (), found.skipped, tuple(warnings))


def _merged(found: Sequence[FolderImages], entry: Entry) -> FolderImages:
    """What several folders hold; labels say the folder where there is more than one."""
    if len(found) == 1:
        return found[0]
    images = [
        dataclasses.replace(source, label=f"{encodable(folder.name)}/{source.label}")
        for folder, one in zip(entry.folders, found, strict=True)
        for source in one.images
    ]
    skipped = tuple(name for one in found for name in one.skipped)
    return FolderImages(tuple(images), (), skipped, tuple(w for one in found for w in one.warnings))


def _listed_images(
    entry: Entry, fields: Mapping[str, Any], list_folder: Callable[[Path], FolderImages]
) -> tuple[ImageSource, ...]:
    """The images that ``images`` names, with the masks that ``masks`` names or that lie beside
    them.
    """
    files = _listed_files(fields.get("images"), entry, "images")
    sources = _beside(files, list_folder)
    if "masks" not in fields:
        return tuple(sources)
    masks = _listed_files(fields["masks"], entry, "masks")
    if len(masks) != len(files):
        raise ConceptError(
            f"{entry.where}: {len(masks)} masks for {len(files)} images; list one mask per image."
        )
    return tuple(dataclasses.replace(s, mask=m) for s, m in zip(sources, masks, strict=True))


def _beside(
    files: Sequence[Path], list_folder: Callable[[Path], FolderImages]
) -> list[ImageSource]:
    """Files with the masks and captions that lie beside them."""
    beside = {
        source.path: source
        for folder in dict.fromkeys(file.parent for file in files)
        for source in list_folder(folder).images
    }
    return [beside.get(file, ImageSource(encodable(file.name), file)) for file in files]


def _listed_files(value: Any, entry: Entry, key: str) -> list[Path]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ConceptError(f"{entry.where}: {key}={shown(value)}: must be a list of file names.")
    files = [user_path(item, entry.root) for item in value]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ConceptError(
            f"{entry.where}: {key} not found: {', '.join(listed(missing))}. Paths are relative "
            f"to {entry.root}."
        )
    return files


def _what_was_there(skipped: Sequence[str]) -> str:
    return (
        f" (only {', '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''})" if skipped else ""
    )
