"""Where the shards of a run lie: each is a run of its own in ``shards/00003-of-00064``."""

from __future__ import annotations

from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME
from catversion_jax.runtime.bucket_paths import is_in_bucket
from catversion_jax.runtime.shards import Shard
from catversion_jax.training.run import names


def shard_root(root: Path, shard: Shard) -> Path:
    """The folder that one shard of the run in ``root`` writes: the run's own where that is all."""
    return root if shard.count == 1 else root / names.SHARDS_FOLDER / shard.folder


def shard_folders(root: Path) -> dict[Shard, Path]:
    """The folders of the shards that have begun, in their order; empty for an undivided run."""
    found = dict[Shard, Path]()
    places = set[Path]()
    own = None if is_in_bucket(root) else root.resolve()
    for path in sorted((root / names.SHARDS_FOLDER).glob("[0-9]*-of-[0-9]*")):
        if (shard := Shard.of_folder(path.name)) is None:
            continue
        place = path if is_in_bucket(path) else path.resolve()
        if place in places or (own is not None and own.is_relative_to(place)):
            continue  # a link to another shard, or around to the run itself
        places.add(place)
        found[shard] = path
    return found


def run_roots(root: Path) -> list[Path]:
    """The folders in which the concepts of a run lie: those of its shards, or its own."""
    return [*shard_folders(root).values()] or [root]


def check_same_shards(root: Path, shard: Shard) -> None:
    """Make sure that the run in ``root`` is divided as it was.

    Raises:
      CatVersionError: it was divided into another number of shards; concepts would be trained
        twice.
    """
    other = next((found for found in shard_folders(root) if found.count != shard.count), None)
    before = None if other is None else f"shards of {other.count} ({other.folder})"
    own = root / names.CONCEPTS_FOLDER
    if shard.count > 1 and next(own.glob(f"*/{CONCEPT_FILE_NAME}"), None) is not None:
        before = f"an undivided run ({own})"
    if before is not None:
        raise CatVersionError(
            f"shard={shard}: output_dir={root} holds {before}. Keep the number of shards for all "
            "of a run, or give another output_dir."
        )
