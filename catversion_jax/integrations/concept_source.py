"""From what a user names to a concept: a file, a folder, a hub repository, or tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.integrations.loaded_concept import (
    CONCEPT_FILE_NAME,
    CatVersionLoadError,
    LoadedConcept,
    concept_of,
    parse_concept,
)


def read_concept(
    source: str | Path | Mapping[str, Any],
    subfolder: str | None = None,
    weight_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    **hub: Any,
) -> tuple[tuple[LoadedConcept, ...], str]:
    """What the concept holds for each text encoder, and what to call its source in messages; see
    ``load_catversion``.

    Raises:
      CatVersionLoadError: there is none, or it is damaged.
    """
    if isinstance(source, Mapping):
        if not isinstance(metadata, Mapping) or not all(
            isinstance(text, str) for text in (*source, *metadata, *metadata.values())
        ):
            raise CatVersionLoadError(
                f"a state dict of {len(source)} tensors without metadata of texts: its base "
                "class and bias are in the file's header. Pass metadata=safe_open(file, "
                "'pt').metadata(), or the file itself."
            )
        return concept_of(source, metadata, "state dict"), "state dict"
    file = _resolve_file(source, subfolder, weight_name, **hub)
    return parse_concept(file.read_bytes(), str(file)), str(file)


def _resolve_file(
    source: str | Path,
    subfolder: str | None = None,
    weight_name: str | None = None,
    **hub: Any,
) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise CatVersionLoadError(
            f"{source!r:.80}: must be a concept file, its folder, a hub id or a state dict. Give "
            "one concept at a time."
        )
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or NUL in it
        raise CatVersionLoadError(
            f"{source!s:.80}: cannot be read ({error!s:.80}). Check the path."
        ) from error
    if is_folder:
        return _file_in(path / (subfolder or ""), weight_name)
    if is_file:
        return path
    owner, *parts = str(source).split("/")
    if not parts or owner in ("", ".", "..", "~"):
        raise CatVersionLoadError(
            f"{source}: no such file. Give a concept file, its folder, or a hub id like user/repo."
        )
    inside = [*parts[1:], *([subfolder] if subfolder else []), *([weight_name or ""])]
    name = "/".join(part for part in inside if part)
    if not name.endswith(".safetensors"):
        name = "/".join(part for part in (name, CONCEPT_FILE_NAME) if part)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{parts[0]}", name, **hub))
    except Exception as error:
        # the hub's exceptions differ by version; all mean that there is no file
        raise CatVersionLoadError(
            f"{source}: no such file here, and no {name} in a hub repository of that name "
            f"({type(error).__name__}: {error}). Check the spelling, and the connection for a hub "
            "id; subfolder= and weight_name= name a file inside."
        ) from error


def _file_in(folder: Path, weight_name: str | None) -> Path:
    """The named file, a run folder's, or the only one of a folder that was exported."""
    file = folder / (weight_name or CONCEPT_FILE_NAME)
    if file.is_file():
        return file
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1 and weight_name is None:
        return folder / others[0]
    there = f" It holds {', '.join(others[:5])}: choose with weight_name=." if others else ""
    raise CatVersionLoadError(
        f"{folder}: no {file.name} in it.{there} Give a concept's folder or file."
    )
