"""Photos of a concept that are kept from training, for ``catversion evaluate`` to score against.

A score against the photos that were trained on is too high (arXiv 2503.06632). Held out are, first
that applies:

| what says so                                                | which photos                  |
|-------------------------------------------------------------|-------------------------------|
| ``eval_images`` of the concept: file names, or a folder      | those                         |
| a sub-folder named ``eval_images`` in the concept's folder   | those in it                   |
| ``holdout=N``                                                | the last N, where 3 are left  |
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.concepts.entries import Entry
from catversion_jax.concepts.folders import ImageSource, list_images
from catversion_jax.concepts.user_paths import user_path
from catversion_jax.errors import CatVersionError, ConceptError, encodable, listed, shown

FEWEST_LEFT = 3
"""Training photos that ``holdout`` leaves to a concept: the fewest that are usual in the field."""


def eval_folder(entry: Entry, fields: Mapping[str, Any]) -> Path | None:
    """The folder that ``eval_images`` names; None where it names files or nothing."""
    value = fields.get("eval_images")
    if not isinstance(value, str) or "|" in value:
        return None
    path = user_path(value, entry.root)
    return path if path.is_dir() else None


def listed_names(value: Any) -> Any:
    """``eval_images`` as a list: a cell of a table has names with ``|`` between them."""
    return [name.strip() for name in value.split("|")] if isinstance(value, str) else value


def folder_photos(folder: Path, entry: Entry) -> tuple[ImageSource, ...]:
    """The held-out photos of a folder, with masks as a training folder has them.

    Raises:
      ConceptError: it holds no photo, or is the concept's own folder.
    """
    if any(os.path.samefile(folder, own) for own in entry.folders):
        raise ConceptError(
            f"{entry.where}: eval_images: {folder} is the folder of the training images itself. "
            "List the file names, or give the held-out photos a folder of their own."
        )
    sources = list_images(folder).images
    if not sources:
        raise ConceptError(
            f"{entry.where}: eval_images: no image in {folder}. Put photos there or drop the key."
        )
    return tuple(
        ImageSource(f"{encodable(folder.name)}/{source.label}", source.path, mask=source.mask)
        for source in sources
    )


def without(
    images: Sequence[ImageSource], held_out: Sequence[ImageSource], where: str
) -> tuple[ImageSource, ...]:
    """The training images that are not held out.

    Raises:
      ConceptError: none is left.
    """
    paths = {source.path.resolve() for source in held_out if source.path is not None}
    left = tuple(s for s in images if s.path is None or s.path.resolve() not in paths)
    if images and not left:
        raise ConceptError(
            f"{where}: eval_images: names all {len(images)} images, so none is left to train on. "
            "Name some of them only."
        )
    return left


def split_last(
    images: Sequence[ImageSource], holdout: int
) -> tuple[tuple[ImageSource, ...], tuple[ImageSource, ...], str | None]:
    """Training images and the last ``holdout`` ones; all and none where too few would be left.

    Returns:
      Both, and what a user should know about it.
    """
    count = len(images)
    if count - holdout < FEWEST_LEFT:
        return (
            tuple(images),
            (),
            (
                f"holdout={holdout}: all {count} images stay in training, as fewer than "
                f"{FEWEST_LEFT} would be left"
            ),
        )
    return tuple(images[:-holdout]), tuple(images[-holdout:]), None


def check_holdout(holdout: object) -> int:
    """``holdout``, a number of photos.

    Raises:
      CatVersionError: it is none.
    """
    if isinstance(holdout, bool) or not isinstance(holdout, int) or holdout < 0:
        raise CatVersionError(
            f"holdout={shown(holdout)}: must be a number of photos, 0 for none or usually 1."
        )
    return holdout


def held_out_note(held_out: Sequence[ImageSource]) -> str:
    """Which photos are kept from training, in one line."""
    names = ", ".join(listed([source.label for source in held_out]))
    return f"held out from training, for evaluation: {names}"
