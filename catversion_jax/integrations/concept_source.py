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
from catversion_jax.runtime.concept_packs import PackError, read_packed


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
    if isinstance(source, str | os.PathLike) and "\0" not in os.fspath(source):
        try:
            packed = read_packed(source)
        except PackError as error:
            raise CatVersionLoadError(str(error)) from error
        if packed is not None:
            return parse_concept(packed, str(source)), str(source)
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
    owner, *parts = str(source).removeprefix("hf://").split("/")
    if not parts or owner in ("", ".", "..", "~"):
        raise CatVersionLoadError(
            f"{source}: no such file. Give a concept file, its folder, or a hub id like user/repo."
        )
    inside = [*parts[1:], *([subfolder] if subfolder else []), *([weight_name or ""])]
    name = "/".join(part for part in inside if part)
    if name and not name.endswith(".safetensors"):
        name = f"{name}/{CONCEPT_FILE_NAME}"
    return _downloaded(str(source), f"{owner}/{parts[0]}", name, hub)


def _downloaded(source: str, repo_id: str, name: str, hub: Mapping[str, Any]) -> Path:
    """A file of a hub repository; without a name its only concept, at the top or in a folder."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    wanted = name or CONCEPT_FILE_NAME
    try:
        try:
            return Path(hf_hub_download(repo_id, wanted, **hub))
        except errors.EntryNotFoundError:
            if name or hub.get("local_files_only"):
                raise
        listing = HfApi(token=hub.get("token")).list_repo_files(
            repo_id, revision=hub.get("revision")
        )
        found = sorted(path for path in listing if path.endswith(f"/{CONCEPT_FILE_NAME}"))
        if len(found) == 1:
            return Path(hf_hub_download(repo_id, found[0], **hub))
    except Exception as error:
        # the hub's exceptions differ by version; all mean that there is no file
        raise CatVersionLoadError(
            f"{source}: no such file here, and no {wanted} in a hub repository of that name "
            f"({type(error).__name__}: {error}). Check the spelling, and the connection for a hub "
            "id; subfolder= and weight_name= name a file inside."
        ) from error
    folders = ", ".join(f"{repo_id}/{path.rpartition('/')[0]}" for path in found[:8])
    remedy = f"Give one of {folders}." if found else "Give a repository with concepts."
    raise CatVersionLoadError(f"{source}: the repository holds {len(found)} concepts. {remedy}")


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
