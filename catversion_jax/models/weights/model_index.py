"""A diffusers folder's ``model_index.json``: which components it has, by plain names.

The keys become names of folders, here and in what is exported, so a key such as ``../secret`` is
refused before anything is read or written by it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.weights.hf_config import read_config

MODEL_INDEX = "model_index.json"
ZEROS_FOR_EMPTY = "force_zeros_for_empty_prompt"
EXPORTED_CONCEPTS = "catversion"
"""The folder of the concepts in an exported pipeline."""
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")  # diffusers hands them to a constructor
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,199}")


def read_model_index(folder: str | Path) -> dict[str, Any]:
    """The content of ``folder/model_index.json``; lists in it are ``[library, class]``.

    Raises:
      CatVersionError: missing, no JSON object, or a name in it that is not plain.
    """
    index = read_config(folder, MODEL_INDEX)
    where = Path(folder) / MODEL_INDEX
    for key, value in index.items():
        if not _KEY.fullmatch(key):
            raise CatVersionError(
                f"{where}: {shown(key)} names a component; must be a plain name such as 'unet'. "
                "Do not use this model: its files were made to reach outside of it."
            )
        if isinstance(value, list) and not _is_component(value):
            raise CatVersionError(
                f"{where}: {key} = {shown(value)}, must be a library and a class, or two nulls. "
                "Download the model again."
            )
    return index


def component_class(index: dict[str, Any], name: str) -> str | None:
    """The class of a component; None where the index has no such component.

    Raises:
      CatVersionError: the entry is something else.
    """
    value = index.get(name)
    if value is None:
        return None
    if not isinstance(value, list):
        raise CatVersionError(
            f"{MODEL_INDEX}: {name} = {shown(value)}, must be a library and a class, or two nulls. "
            "Download the model again."
        )
    return value[1]


def zeros_for_empty_prompt(folder: str | Path) -> bool:
    """Whether a Stable Diffusion XL takes zeros where a negative prompt is empty; diffusers'
    default is yes.

    Raises:
      CatVersionError: the entry is neither true nor false.
    """
    value = read_model_index(folder).get(ZEROS_FOR_EMPTY, True)
    if not isinstance(value, bool):
        raise CatVersionError(
            f"{Path(folder) / MODEL_INDEX}: {ZEROS_FOR_EMPTY} = {shown(value)}, must be true or "
            "false. Correct it, or download the model again."
        )
    return value


def _is_component(value: list[Any]) -> bool:
    return len(value) == 2 and all(
        part is None or (isinstance(part, str) and _CLASS.fullmatch(part)) for part in value
    )


def exported_concepts(folder: Path) -> list[Path]:
    """The concept files of an exported pipeline; none of any other folder."""
    return sorted((folder / EXPORTED_CONCEPTS).glob("*.safetensors"))
