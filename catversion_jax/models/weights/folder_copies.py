"""Copying the components of a diffusers folder.

Every file is a copy. A hard link would be one file with the model's own, and saving into the folder
writes through it; a symbolic link too, and breaks when either folder moves.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError, listed
from catversion_jax.models.weights.model_index import read_model_index
from catversion_jax.runtime.atomic_files import make_folder, unwritable

_MOST_FILES = 1000  # of one component
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")

logger = logging.getLogger(__name__)


def copy_components(model_folder: Path, output: Path) -> dict[str, Any]:
    """Copy the components that ``model_index.json`` names; links that lead out of the model folder
    are logged.

    Returns:
      The content of ``model_index.json``, without the components that are not there.

    Raises:
      CatVersionError: the index cannot be used, or a file cannot be copied.
    """
    index = read_model_index(model_folder)
    make_folder(output)
    leaving: list[str] = []
    for name, component in index.items():
        if not isinstance(component, list) or component[0] is None:
            continue
        if (model_folder / name).is_dir():
            leaving += _copy_folder(model_folder / name, output / name, model_folder)
        else:  # a download that left out, say, the safety checker
            index[name] = [None, None]
    if leaving:
        logger.warning(
            "%s: links lead out of the model folder, and what they lead to is copied into %s; make "
            "sure that it may be there: %s",
            model_folder,
            output,
            ", ".join(listed(leaving)),
        )
    return index


def _copy_folder(source: Path, target: Path, model_folder: Path) -> list[str]:
    """Copy the files of one component; pickled weights are left out where safetensors are beside
    them. What a link leads to is copied, never the link.

    Returns:
      The links that lead out of the model folder, and where to.

    Raises:
      CatVersionError: more files than a component has, or one cannot be copied.
    """
    found = (path for path in source.rglob("*") if path.is_file())
    files = sorted(itertools.islice(found, _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        raise CatVersionError(
            f"{source}: holds more than {_MOST_FILES} files, no component of a model does. Give a "
            "diffusers folder as --model."
        )
    has_safetensors = any(path.suffix == ".safetensors" for path in files)
    leaving = []
    for path in files:
        if has_safetensors and path.suffix in _WEIGHTS:
            continue
        if not _belongs_to(path.resolve(), model_folder):
            leaving.append(f"{path.relative_to(model_folder)} -> {path.resolve()}")
        copy = target / path.relative_to(source)
        make_folder(copy.parent)
        try:
            shutil.copyfile(path, copy)
        except OSError as error:
            raise unwritable(copy, error) from error
    return leaving


def _belongs_to(file: Path, model_folder: Path) -> bool:
    """Whether a file lies in the model folder, or is where a hub cache keeps that folder's files:
    ``models--X/snapshots/COMMIT`` holds links to ``models--X/blobs``.
    """
    folder = model_folder.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1] / "blobs")
    return any(file.is_relative_to(home) for home in homes)
