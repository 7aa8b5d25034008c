"""What decides the result of each concept of the queue: of a list that was read, all at once; of a
long one, of each when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from catversion_jax.concepts import ConceptList, ConceptSpec
from catversion_jax.concepts.long_lists import LongList
from catversion_jax.config import DataOptions, MethodOptions
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.training.preparation import describe_concept, describe_concepts
from catversion_jax.training.run.identity import image_digests
from catversion_jax.training.run.records import ConceptRecord

SAMPLE = 100
"""Concepts of a long list that are looked at before the first one's turn comes."""


class AllRecords(dict[str, ConceptRecord]):
    """Of a list that was read: everything is known at the start.

    Attributes:
      failures: why further concepts cannot be trained, by name, as far as that is known.
      room: images and prompts of the largest concept; (1, 1) where that is not known.
      believed: concepts of which ``index.csv`` is believed that they are finished; the others are
        compared with their files.
    """

    believed: frozenset[str] = frozenset()

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

    def retrain(self, budgets: Mapping[str, Mapping[str, int]]) -> None:
        """Give some concepts the larger budgets of ``retrain=failed``."""
        self.update({name: self[name].with_budget(own) for name, own in budgets.items()})

    def updates(self, names: Iterable[str]) -> int:
        """The updates of all those concepts together."""
        return sum(self[name].updates for name in names)


class LongRecords(Mapping[str, ConceptRecord]):
    """Of a long list: nothing is kept, and what is wrong with a concept shows when it is read.

    Attributes are those of :class:`AllRecords`.
    """

    failures: Mapping[str, str] = {}
    room = (1, 1)

    def __init__(self, concepts: LongList, describe: Any, max_train_steps: int, *, masked: bool):
        self._concepts, self._describe, self._masked = concepts, describe, masked
        self._names = frozenset(concepts.names)
        self._max_train_steps = max_train_steps
        self._budgets: Mapping[str, Mapping[str, int]] = {}

    def read(self, name: str) -> tuple[ConceptSpec, ConceptRecord]:
        """One concept and its record.

        Raises:
          ConceptError: it cannot be trained.
        """
        spec = self._concepts.read(name)
        record = self._describe(spec, images=image_digests(spec, masked=self._masked))
        return spec, record.with_budget(self._budgets.get(name, {}))

    @property
    def believed(self) -> frozenset[str]:
        """All but those whose budget may be larger than the one that the index tells of."""
        return self._names - self._budgets.keys()

    def retrain(self, budgets: Mapping[str, Mapping[str, int]]) -> None:
        """Give some concepts the larger budgets of ``retrain=failed``, each in its turn."""
        self._budgets = budgets

    def updates(self, names: Iterable[str]) -> int:
        """The updates of all those concepts together."""
        of_run = {"max_train_steps": self._max_train_steps}
        return sum(self._budgets.get(name, of_run)["max_train_steps"] for name in names)

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
