"""All shards of a run seen as one: ``index.csv`` and ``run.json`` in the run's own folder.

No concept is copied: the rows name the files in the folders of the shards.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError, shown
from catversion_jax.runtime.regular_files import read_json_object
from catversion_jax.runtime.shards import Shard
from catversion_jax.training.run import names
from catversion_jax.training.run.index import Index, changes_file
from catversion_jax.training.run.manifest import write_manifest
from catversion_jax.training.run.shards import shard_folders
from catversion_jax.training.run.status import read_status

_OWN = ("catversion_jax", "concepts")
"""What ``run.json`` says beside the settings: the version that wrote it, and counts."""


def merge_shards(root: Path) -> dict[str, Any]:
    """Write one index of all shards that have begun; they may be at work meanwhile.

    Args:
      root: ``output_dir`` of the run.

    Returns:
      What :func:`~catversion_jax.training.run.status.read_status` says of the run.

    Raises:
      CatVersionError: there are no shards, they are of two divisions, learn with different options
        or models, or two of them hold the same concept.
    """
    shards = shard_folders(root)
    if not shards:
        raise CatVersionError(
            f"{root}: has no shards to merge (no {names.SHARDS_FOLDER}/00000-of-...). Give the "
            "output_dir of runs with shard=i/n; an undivided run has its index already."
        )
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        raise CatVersionError(
            f"{root}: holds shards of {' and of '.join(map(str, counts))}, which would train "
            "concepts twice. Remove the folders of one division."
        )
    settings = _same_settings(shards)
    found = read_status(root)
    places: dict[str, list[str]] = collections.defaultdict(list)
    for row in found["concepts"]:
        places[row["name"]].append(row["file"] or row["state"])
    twice = {name: where for name, where in places.items() if len(where) > 1}
    if twice:
        name, where = next(iter(twice.items()))
        raise CatVersionError(
            f"{root}: {len(twice)} concepts lie in two shards, the first is {shown(name)} "
            f"({' and '.join(where)}). Remove it from one of them; a concept's name decides its "
            "shard, so that list was not this run's."
        )
    index = Index(root / names.INDEX_FILE)
    for row in found["concepts"]:
        index.set({key: value for key, value in row.items() if key != "step"})
    index.write()
    changes_file(root / names.INDEX_FILE).unlink(missing_ok=True)  # there will be none
    write_manifest(root, settings, index.counts)
    return found


def _same_settings(shards: Mapping[Shard, Path]) -> dict[str, Any]:
    """The settings of all shards that have begun.

    Raises:
      CatVersionError: two shards have different ones.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    for folder in shards.values():
        content = read_json_object(folder / names.RUN_FILE)
        own = {key: value for key, value in content.items() if key not in _OWN}
        if not own:
            continue  # it has not come so far
        if first is None:
            first = folder, own
        elif own != first[1]:
            options = [one.get("options") for one in (first[1], own)]
            flat = [
                {**one, **(option if isinstance(option, dict) else {})}
                for one, option in zip((first[1], own), options, strict=True)
            ]
            changed = [
                f"{key}: {shown(flat[0].get(key))} and {shown(flat[1].get(key))}"
                for key in sorted({*flat[0], *flat[1]} - {"options"})
                if flat[0].get(key) != flat[1].get(key)
            ]
            raise CatVersionError(
                f"{first[0].name} and {folder.name} are not of one run: {'; '.join(changed)}. "
                "Start all shards with the same command, each until it is done."
            )
    return {} if first is None else first[1]
