"""A concept on the Hugging Face hub, ``hf://USER/NAME/rex``: downloaded once, then a local file.

The loader for diffusers looks for it by the same rules.
"""

from __future__ import annotations

import re
from pathlib import Path

from catversion_jax.errors import CatVersionError, shown

ADDRESS = "hf://"
_PARTS = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+?))?/?")


def hub_concept(address: str, file_name: str) -> Path:
    """The local copy of a concept's file.

    Args:
      address: ``hf://USER/NAME``, of a repository with one concept, or with a folder or a file
        inside it.
      file_name: of a concept in its folder.

    Raises:
      CatVersionError: there is none, or it cannot be downloaded.
    """
    import huggingface_hub

    found = _PARTS.fullmatch(address)
    if not found:
        raise CatVersionError(
            f"{shown(address)}: must be like hf://USER/NAME or hf://USER/NAME/concept."
        )
    repo_id, inside = found.groups()
    path = inside or ""
    try:
        if not inside:
            listing = huggingface_hub.HfApi().list_repo_files(repo_id)
            path = _only_concept(address, listing, file_name)
        elif not inside.endswith(".safetensors"):
            path = f"{inside}/{file_name}"
        return Path(huggingface_hub.hf_hub_download(repo_id, path))
    except CatVersionError:
        raise
    except Exception as error:  # the hub's exceptions, and its HTTP client's, differ by version
        raise CatVersionError(
            f"{address}: no {path or 'such repository'} on the hub that can be downloaded "
            f"({shown(error)}). Check the spelling and the connection; for a private repository "
            "log in with 'hf auth login'."
        ) from error


def _only_concept(address: str, listing: list[str], file_name: str) -> str:
    if file_name in listing:
        return file_name
    found = sorted(path for path in listing if path.endswith(f"/{file_name}"))
    if len(found) == 1:
        return found[0]
    folders = ", ".join(f"{address}/{path.rpartition('/')[0]}" for path in found[:8])
    remedy = f"Give one of {folders}." if found else "Give a repository with concepts."
    raise CatVersionError(f"{address}: holds {len(found)} concepts. {remedy}")


def check_repo_id(repo_id: str) -> None:
    """Make sure that a text can be the id of a repository.

    Raises:
      CatVersionError: it cannot.
    """
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(repo_id)
        valid = "/" in repo_id
    except errors.HFValidationError:
        valid = False
    if not valid:
        raise CatVersionError(
            f"{shown(repo_id)}: must be USER/NAME, as the hub calls a repository: at most 96 "
            "letters, digits, '-', '_' and '.', none of these three at an end, and no '--', '..' "
            "or '.git'."
        )
