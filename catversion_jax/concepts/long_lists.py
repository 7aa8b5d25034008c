"""Lists of very many concepts: opened by their names, and each concept is read and checked when its
turn comes.

Reading a concept looks into its folder, which takes a millisecond or more; of a million concepts
nobody waits for that before the first one is trained.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from catversion_jax.concepts.folders import MaskPolarity, list_images
from catversion_jax.concepts.held_out import check_holdout
from catversion_jax.concepts.manifests import LongManifest
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.concepts.reading import (
    ConceptList,
    ConceptProblem,
    ConceptSpec,
    read_configured_concepts,
    read_entry,
)
from catversion_jax.concepts.user_paths import user_path
from catversion_jax.config import DataOptions
from catversion_jax.errors import ConceptError, shown
from catversion_jax.runtime.shards import WHOLE, Shard, find_shard

LONG = 10_000
"""From so many rows on a list in a ``.csv`` or ``.jsonl`` file is a long one."""
_FOLDERS = 64
"""Listings of folders that are kept, for concepts that lie in one folder."""


class LongList:
    """The concepts of a long list.

    Attributes:
      names: of all of them, in the order of the list.
      notes: remarks on the list as a whole.
    """

    def __init__(
        self,
        manifest: LongManifest,
        *,
        base_class: str | None,
        default_when: str,
        mask_polarity: MaskPolarity | None,
        max_megapixels: float,
        holdout: int,
    ):
        self.names, self.notes = manifest.names, manifest.notes
        self._manifest = manifest
        self._read = functools.partial(
            read_entry,
            base_class=base_class,
            single=False,
            default_when=default_when,
            mask_polarity=mask_polarity,
            max_megapixels=max_megapixels,
            holdout=check_holdout(holdout),
            list_folder=functools.lru_cache(_FOLDERS)(list_images),
        )

    def part(self, shard: Shard) -> LongList:
        """The concepts that belong to ``shard``."""
        if shard == WHOLE:
            return self
        part = copy.copy(self)
        part.names = [name for name in self.names if shard.holds(name)]
        return part

    def read(self, name: str) -> ConceptSpec:
        """One concept, checked; no image is decoded.

        Raises:
          ConceptError: it cannot be trained.
        """
        return self._read(self._manifest.entry(name))

    def blocks(self, size: int) -> Iterator[ConceptList]:
        """All concepts in order, so many at a time."""
        for start in range(0, len(self.names), size):
            concepts, problems = list[ConceptSpec](), list[ConceptProblem]()
            for name in self.names[start : start + size]:
                try:
                    concepts.append(self.read(name))
                except ConceptError as error:
                    problems.append(ConceptProblem(name, str(error)))
            yield ConceptList(tuple(concepts), tuple(problems))


def open_long_list(
    source: str | Path,
    *,
    base_class: str | None = None,
    default_when: str = "class_word",
    mask_polarity: MaskPolarity | None = DataOptions.mask_polarity,
    max_megapixels: float = DataOptions.max_megapixels,
    holdout: int = DataOptions.holdout,
) -> LongList | None:
    """The list at ``source``, or None where that is no long list.

    Arguments are those of :func:`~catversion_jax.concepts.read_concepts`.

    Raises:
      CatVersionError: the list as a whole is not understood, or has duplicate names.
    """
    with concept_errors(f"{shown(str(source))[1:-1]}: cannot be read as concepts"):
        manifest = LongManifest.of(user_path(str(source), Path()), LONG)
    if manifest is None:
        return None
    return LongList(
        manifest,
        base_class=base_class,
        default_when=default_when,
        mask_polarity=mask_polarity,
        max_megapixels=max_megapixels,
        holdout=holdout,
    )


def open_configured_concepts(options: DataOptions, default_when: str) -> ConceptList | LongList:
    """The concepts of a run: a long list as it is opened, another one read and checked.

    Raises:
      CatVersionError: as for :func:`~catversion_jax.concepts.read_concepts`.
    """
    long_list = open_long_list(
        options.concepts,
        base_class=options.base_class,
        default_when=default_when,
        mask_polarity=options.mask_polarity,
        max_megapixels=options.max_megapixels,
        holdout=options.holdout,
    )
    if long_list is None:
        return read_configured_concepts(options, default_when)
    return long_list.part(find_shard(options.shard or str(WHOLE), os.environ))
