"""The rows of the compiled program and the concepts in them.

When the concept in a row is done, the next one takes the row: what changes is data
(learned, moments, step counter, latents, text states, key), never a shape, so nothing is compiled
again. Rows without a concept repeat another one's work; nobody reads their results.

Only what changes travels: newcomers go to their devices in groups of at most one for each device
(:class:`Newcomers`) and are written over the rows that they get, in place. Rows are read from the
device in such groups too, so that no cost grows with the number of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from catversion_jax.config import ObjectiveOptions
from catversion_jax.methods.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.runtime.sharding import (
    CONCEPT_AXIS,
    by_concept,
    on_every_device,
    place_by_concept,
)
from catversion_jax.training.preparation import PreparedConcept, assemble_rows
from catversion_jax.training.run.checkpoint import SavedRow
from catversion_jax.training.state import ConceptData, TrainState, create_train_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Occupant:
    """A concept under way, which occupies a row.

    Attributes:
      concept: what was read and encoded of it.
      row: index of its row.
      step: updates dispatched.
      evaluations: (step, evaluation loss) so far.
      plain_loss: the plain model's evaluation loss.
      failed_step: the step that was not finite, as far as the host has heard; -1 while healthy.
      began: seconds into the run at which it got the row.
      first_step: its step at that moment.
    """

    concept: PreparedConcept
    row: int
    step: int
    evaluations: list[tuple[int, float]]
    plain_loss: float
    failed_step: int
    began: float
    first_step: int

    @property
    def name(self) -> str:
        """Name of the concept."""
        return self.concept.spec.name

    @property
    def updates(self) -> int:
        """After how many updates it is finished."""
        return self.concept.record.updates


@dataclasses.dataclass(frozen=True)
class Newcomers:
    """Concepts that lie on the devices of their rows and are not in them yet, at most one for each
    of the G places of the mesh's concept axis. A place without one repeats an earlier concept.

    Attributes:
      concepts: by the row that each will get.
      saved: states of those that were under way, by row; those go on where they were.
      state: leaves ``[G ...]``.
      data: leaves ``[G ...]``.
      plain: the same data for the plain model, whose prompts hold no learned vectors.
      is_there: ``[G]`` bool, which places have a newcomer.
    """

    concepts: Mapping[int, PreparedConcept]
    saved: Mapping[int, SavedRow]
    state: TrainState
    data: ConceptData
    plain: ConceptData
    is_there: np.ndarray

    def step(self, row: int) -> int:
        """Updates that the concept of a row has behind it."""
        return self.saved[row].step if row in self.saved else 0


class Rows:
    """State and data of all rows, on the mesh.

    Args:
      num_rows: rows of the compiled program on all devices of the mesh.
      mesh: of this process.
      backbone: the frozen networks.
      objective: how the loss is made, which decides what data a row holds.
      tx: the optimizer, whose moments a row holds.
      averaged: whether a moving average of what is learned is kept.
      max_images: images of the largest concept of the run, as far as it is known.
      max_prompts: training prompts of the concept with most of them, as far as it is known.

    Attributes:
      state, data: what the compiled programs take; there from the first :meth:`put` on.
      occupied: the concepts under way, by row.
    """

    state: TrainState
    data: ConceptData

    def __init__(
        self,
        num_rows: int,
        mesh: Mesh,
        backbone: Backbone,
        objective: ObjectiveOptions,
        tx: optax.GradientTransformation,
        *,
        averaged: bool,
        max_images: int,
        max_prompts: int,
    ):
        self.num_rows, self.occupied = num_rows, dict[int, Occupant]()
        self._mesh, self._filled = mesh, False
        self._num_places = mesh.shape[CONCEPT_AXIS]
        self._of_one_place = num_rows // self._num_places
        self._assemble = functools.partial(assemble_rows, backbone=backbone, objective=objective)
        self._room = (max_images, max_prompts)
        self._start = jax.jit(functools.partial(create_train_state, tx=tx, averaged=averaged))
        self._latest: dict[int, list[Any]] = {}  # of each place, on its devices
        by_row = functools.partial(
            on_every_device, mesh=mesh, out_specs=PartitionSpec(CONCEPT_AXIS)
        )
        rows = PartitionSpec(CONCEPT_AXIS)
        self._put = jax.jit(by_row(_put, in_specs=(rows, rows, rows)), donate_argnums=0)
        self._take = jax.jit(by_row(_take, in_specs=(rows, rows)))
        repeat = functools.partial(_repeat, count=self._of_one_place)
        self._repeat = jax.jit(by_row(repeat, in_specs=rows))
        self._pad = jax.jit(by_row(_pad, in_specs=(rows, rows)))

    @property
    def free(self) -> list[int]:
        """Rows without a concept."""
        return [row for row in range(self.num_rows) if row not in self.occupied]

    def groups(self, rows: Iterable[int]) -> list[list[int]]:
        """The rows in groups with at most one on each device, so that devices work side by side."""
        of_place: list[list[int]] = [[] for _ in range(self._num_places)]
        for row in rows:
            of_place[self._place(row)].append(row)
        together = itertools.zip_longest(*of_place)
        return [[row for row in group if row is not None] for group in together]

    def by_row(self, group: Iterable[int], values: np.ndarray) -> dict[int, float]:
        """Values ``[G]`` of the places of the mesh, as those of a group's rows."""
        return {row: float(values[self._place(row)]) for row in group}

    def is_there(self, group: Iterable[int]) -> np.ndarray:
        """``[G]`` bool: which places of the mesh have a row in a group."""
        return np.isin(np.arange(self._num_places), [self._place(row) for row in group])

    def _place(self, row: int) -> int:
        return row // self._of_one_place

    def make_room(self, concepts: Iterable[PreparedConcept]) -> None:
        """Let every row hold as many images and prompts as the largest of ``concepts`` has.

        Where the largest concept of the run was known at the start, nothing is to be done.
        """
        images, prompts = self._room
        for concept in concepts:
            images = max(images, len(concept.encoded.mean))
            prompts = max(prompts, len(concept.prompts))
        if (images, prompts) == self._room:
            return
        logger.info("the rows now hold %d images and %d prompts", images, prompts)
        self._room = (images, prompts)
        self._latest.clear()

    def send(
        self, concepts: Mapping[int, PreparedConcept], saved: Mapping[str, SavedRow]
    ) -> Newcomers:
        """Bring concepts to the devices of their rows; the rows stay as they are until :meth:`put`.

        Args:
          concepts: one group of them, by the row that each gets.
          saved: states of concepts that were under way, by name.
        """
        known = {
            row: saved[concept.spec.name]
            for row, concept in concepts.items()
            if concept.spec.name in saved
        }
        pieces = {
            self._place(row): self._piece(concept, known.get(row))
            for row, concept in concepts.items()
        }
        if not self._latest:  # no place may be without numbers
            first = next(iter(pieces.values()))
            pieces = {place: pieces.get(place, first) for place in range(self._num_places)}
        for place, piece in pieces.items():
            devices = self._mesh.devices[place]
            self._latest[place] = [jax.device_put(piece, device) for device in devices]
        on_devices = [one for place in range(self._num_places) for one in self._latest[place]]
        state, data, plain_text = jax.tree.map(self._global, *on_devices)
        plain = data if plain_text is None else dataclasses.replace(data, text=plain_text)
        return Newcomers(concepts, known, state, data, plain, self.is_there(concepts))

    def _piece(
        self, concept: PreparedConcept, known: SavedRow | None
    ) -> tuple[TrainState, ConceptData, tuple[LowerStates, ...] | None]:
        """State, data and the plain model's text of one concept, leaves ``[1 ...]`` on the host;
        None where the plain model reads the same text.
        """
        images, prompts = self._room
        learned, data, plain = self._assemble([concept], max_images=images, max_prompts=prompts)
        state = jax.tree.map(np.asarray, self._start(learned))
        if known is not None:
            state = jax.tree.map(
                lambda fresh, leaf: np.asarray(leaf, fresh.dtype)[None], state, known.state
            )
        return state, data, None if plain.text is data.text else plain.text

    def _global(self, *leaves: jax.Array) -> jax.Array:
        """The leaves ``[1 ...]`` of all devices as one array ``[G ...]``."""
        return jax.make_array_from_single_device_arrays(
            (self._num_places, *leaves[0].shape[1:]), by_concept(self._mesh), leaves
        )

    def put(self, newcomers: Newcomers, now: float) -> None:
        """Write newcomers over the rows that they get.

        Args:
          newcomers: what :meth:`send` returned; it is of no use afterwards.
          now: seconds into the run.
        """
        sent = (newcomers.state, newcomers.data)
        if not self._filled:
            self.state, self.data = self._repeat(sent)
            self._filled = True
        elif any(map(_differ, jax.tree.leaves(self.data), jax.tree.leaves(newcomers.data))):
            self.data = self._pad(self.data, newcomers.data)
        self.state, self.data = self._put(
            (self.state, self.data), sent, self._indices(newcomers.concepts)
        )
        for row, concept in newcomers.concepts.items():
            known, step = newcomers.saved.get(row), newcomers.step(row)
            self.occupied[row] = Occupant(
                concept=concept,
                row=row,
                step=step,
                evaluations=[] if known is None else list(known.evaluations),
                plain_loss=float("nan"),
                failed_step=-1,
                began=now,
                first_step=step,
            )

    def take(self, group: Iterable[int]) -> tuple[Learned, ConceptData]:
        """What the rows of a group have learned, and their data, leaves ``[G ...]``; a place
        without a row in it gives one that nobody should read.
        """
        return self._take((self.state.exported, self.data), self._indices(group))

    def _indices(self, group: Iterable[int]) -> jax.Array:
        """``[G]`` int32: of each place the row among its own; -1 where it has none."""
        indices = np.full(self._num_places, -1, np.int32)
        for row in group:
            indices[self._place(row)] = row % self._of_one_place
        return place_by_concept(indices, self._mesh)

    def saved_rows(self) -> list[SavedRow]:
        """All concepts under way, read from the device."""
        state = jax.tree.map(np.asarray, self.state)
        return [
            SavedRow(
                occupant.concept.record,
                jax.tree.map(lambda leaf, row=row: leaf[row], state),
                tuple(occupant.evaluations),
                row,
            )
            for row, occupant in sorted(self.occupied.items())
        ]

    def exported(self, occupants: Sequence[Occupant]) -> list[tuple[Learned, int]]:
        """What each of the concepts has learned, and its step that was not finite (-1: none)."""
        learned, failed = jax.tree.map(np.asarray, (self.state.exported, self.state.failed_step))
        return [
            (
                jax.tree.map(lambda leaf, row=occupant.row: leaf[row], learned),
                int(failed[occupant.row]),
            )
            for occupant in occupants
        ]


def _put(rows: Any, new: Any, index: jax.Array) -> Any:
    """On one device: ``new [1 ...]`` written over row ``index [1]``; over none where it is -1."""
    at = jnp.maximum(index[0], 0)

    def one(before: jax.Array, after: jax.Array) -> jax.Array:
        kept = jax.lax.dynamic_slice_in_dim(before, at, 1)
        after = jnp.where(index[0] < 0, kept, after)
        return jax.lax.dynamic_update_slice_in_dim(before, after, at, 0)

    return jax.tree.map(one, rows, new)


def _take(rows: Any, index: jax.Array) -> Any:
    """On one device: row ``index [1]``, leaves ``[1 ...]``; row 0 where it is -1."""
    at = jnp.maximum(index[0], 0)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1), rows)


def _repeat(row: Any, count: int) -> Any:
    """On one device: a row, leaves ``[1 ...]``, ``count`` times."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), row)


def _pad(rows: Any, row: Any) -> Any:
    """On one device: rows with zeros behind what they hold, so that it is as long as in ``row``."""

    def one(leaf: jax.Array, like: jax.Array) -> jax.Array:
        if leaf.shape[1:] == like.shape[1:]:
            return leaf
        lengths = zip(leaf.shape[1:], like.shape[1:], strict=True)
        return jnp.pad(leaf, [(0, 0), *((0, longer - length) for length, longer in lengths)])

    return jax.tree.map(one, rows, row)


def _differ(rows: jax.Array, row: jax.Array) -> bool:
    return rows.shape[1:] != row.shape[1:]
