"""What decides the result of each concept of the queue: of a list that was read, all at once; of a
long one, of each when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from catversion_jax.concepts import ConceptList, ConceptSpec
from catversion_jax.concepts.long_lists import LONG, LongList
from catversion_jax.config import DataOptions, MethodOptions, RecordingOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.shards import Shard
from catversion_jax.training.preparation import describe_concept, describe_concepts
from catversion_jax.training.retraining import larger_budgets
from catversion_jax.training.run.identity import image_digests
from catversion_jax.training.run.records import ConceptRecord

SAMPLE = 100
"""Concepts of a long list that are looked at before the first one's turn comes."""


class AllRecords(dict[str, ConceptRecord]):
    """Of a list that was read: everything is known at the start.

    Attributes:
      failures: why further concepts cannot be trained, by name, as far as that is known.
      room: images and prompts of the largest concept; (1, 1) where that is not known.
      believes_index: whether a concept that ``index.csv`` says is finished is not compared with its
        file.
    """

    believes_index = False

    def __init__(
        self,
        concepts: ConceptList,
        records: Mapping[str, ConceptRecord],
        unusable: Mapping[str, str],
    ):
        super().__init__(records)
        self.failures = {problem.name: problem.message for problem in concepts.problems} | {
            **unusable
        }
        self._specs = {spec.name: spec for spec in concepts.concepts if spec.name in records}
        images = max((len(spec.images) for spec in self._specs.values()), default=1)
        prompts = max((len(record.prompts) for record in records.values()), default=1)
        self.room = (images, prompts)

    def read(self, name: str) -> tuple[ConceptSpec, ConceptRecord]:
        """One concept and its record."""
        return self._specs[name], self[name]

    def retrain(self, options: RecordingOptions, shard: Shard) -> None:
        """Give a larger budget to the concepts that ``retrain=failed`` means."""
        self.update(larger_budgets(self, options, shard))

    def updates(self, names: Iterable[str]) -> int:
        """The updates of all those concepts together."""
        return sum(self[name].updates for name in names)


class LongRecords(Mapping[str, ConceptRecord]):
    """Of a long list: nothing is kept, and what is wrong with a concept shows when it is read.

    Attributes are those of :class:`AllRecords`.
    """

    failures: Mapping[str, str] = {}
    room = (1, 1)
    believes_index = True

    def __init__(self, concepts: LongList, describe: Any, max_train_steps: int, *, masked: bool):
        self._concepts, self._describe, self._masked = concepts, describe, masked
        self._names = frozenset(concepts.names)
        self._max_train_steps = max_train_steps

    def read(self, name: str) -> tuple[ConceptSpec, ConceptRecord]:
        """One concept and its record.

        Raises:
          ConceptError: it cannot be trained.
        """
        spec = self._concepts.read(name)
        return spec, self._describe(spec, images=image_digests(spec, masked=self._masked))

    def retrain(self, options: RecordingOptions, shard: Shard) -> None:
        """Refuse ``retrain=failed``, which compares every concept with the gate's file.

        Raises:
          CatVersionError: that is asked for.
        """
        if options.retrain == "failed":
            raise CatVersionError(
                f"retrain=failed: the list has {len(self)} concepts, which are read one after the "
                f"other. Give a list of those that fail, of fewer than {LONG} concepts."
            )

    def updates(self, names: Iterable[str]) -> int:
        """The updates of all those concepts together."""
        return sum(1 for _ in names) * self._max_train_steps

    def __getitem__(self, name: str) -> ConceptRecord:
        return self.read(name)[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts.names)

    def __len__(self) -> int:
        return len(self._concepts.names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


QueueRecords: TypeAlias = AllRecords | LongRecords
"""The records of the concepts that can be trained, by name, as far as that is known."""


def sample_of(concepts: ConceptList | LongList) -> tuple[Sequence[ConceptSpec], int]:
    """Concepts from which the memory of a run is planned, and the number of all: all of a list that
    was read, the first of a long one.
    """
    if isinstance(concepts, ConceptList):
        return concepts.concepts, len(concepts.concepts)
    return next(concepts.blocks(SAMPLE), ConceptList(())).concepts, len(concepts.names)


def queue_records(
    concepts: ConceptList | LongList,
    backbone: Backbone,
    data: DataOptions,
    method: MethodOptions,
    *,
    seed: int,
    recorded: Mapping[str, Any],
    networks: Mapping[str, str],
    masked: bool,
    max_train_steps: int,
) -> QueueRecords:
    """The records of ``concepts``; further arguments are those of
    :func:`~catversion_jax.training.preparation.describe_concepts`.
    """
    shared: dict[str, Any] = {"seed": seed, "recorded": recorded, "networks": networks}
    if isinstance(concepts, ConceptList):
        found = describe_concepts(
            concepts.concepts, backbone, data, method, masked=masked, **shared
        )
        return AllRecords(concepts, *found)
    describe = functools.partial(
        describe_concept, backbone=backbone, data=data, method=method, **shared
    )
    return LongRecords(concepts, describe, max_train_steps, masked=masked)
