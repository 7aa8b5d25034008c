"""Paths as users write them into lists of concepts."""

from __future__ import annotations

import os
from pathlib import Path

from catversion_jax.errors import ConceptError, shown


def user_path(text: str, root: Path) -> Path:
    r"""The file or folder that a text names: ``~`` is a home, relative paths start at ``root``.

    Backslashes separate folders where nothing has that very name: ``pots\one`` was written on
    Windows.

    Raises:
      ConceptError: ``~name`` of nobody.
    """
    try:
        path = root / Path(text).expanduser()
    except RuntimeError:
        raise ConceptError(
            f"{root}: path {shown(text)}: there is no such user here. Write the path without ~."
        ) from None
    if "\\" in text and not path.exists():
        return user_path(text.replace("\\", "/"), root)
    return path


def is_there(path: Path) -> bool:
    """Whether the file lies there; what it says is not to be left out silently.

    Raises:
      ConceptError: something else does: a link whose target is missing, a folder, a pipe.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise ConceptError(
            f"{path}: is no file that can be read (a link to nothing, a folder or a pipe). Put the "
            "file there, or remove it."
        )
    return False


def folder_of(text: str, root: Path) -> Path:
    """The folder that a text names, relative to ``root`` or, as in other trainers, to the working
    directory.

    Raises:
      ConceptError: neither is a folder.
    """
    beside, here = user_path(text, root), user_path(text, Path())
    for path in (beside, here):
        if path.is_dir():
            return path
    raise ConceptError(f"{shown(text)} not found: neither {beside} nor {here} is a folder.")
