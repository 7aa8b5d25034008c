"""The rows of the compiled program and the concepts in them.

When the concept in a row is done, the next one takes the row: what changes is data
(learned, moments, step counter, latents, text states, key), never a shape, so nothing is compiled
again. Rows without a concept repeat another one's work; nobody reads their results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from catversion_jax.config import ObjectiveOptions
from catversion_jax.methods.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.sharding import CONCEPT_AXIS, place_by_concept
from catversion_jax.training.preparation import PreparedConcept, assemble_rows
from catversion_jax.training.run.checkpoint import SavedRow
from catversion_jax.training.state import ConceptData, TrainState, create_train_state


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


class Rows:
    """State and data of all rows, on the mesh.

    Args:
      num_rows: rows of the compiled program on all devices of the mesh.
      mesh: of this process.
      backbone: the frozen networks.
      objective: how the loss is made, which decides what data a row holds.
      tx: the optimizer, whose moments a row holds.
      averaged: whether a moving average of what is learned is kept.
      max_images: images of the largest concept of the run.
      max_prompts: training prompts of the concept with most of them.

    Attributes:
      state, data: what the compiled programs take; there from the first :meth:`fill` on.
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
        self._assemble = functools.partial(
            assemble_rows,
            backbone=backbone,
            objective=objective,
            max_images=max_images,
            max_prompts=max_prompts,
        )
        self._start = jax.jit(functools.partial(create_train_state, tx=tx, averaged=averaged))
        self._replace = _make_replace(mesh)

    @property
    def free(self) -> list[int]:
        """Rows without a concept."""
        return [row for row in range(self.num_rows) if row not in self.occupied]

    def fill(
        self, newcomers: Mapping[int, PreparedConcept], saved: Mapping[str, SavedRow], now: float
    ) -> ConceptData:
        """Give free rows to concepts.

        Args:
          newcomers: the concepts by the row that they get.
          saved: states of concepts that were under way, by name; those go on where they were.
          now: seconds into the run.

        Returns:
          The plain model's data of all rows (those of ``newcomers`` count).
        """
        first = next(iter(newcomers.values()))
        rows = [newcomers.get(row, first) for row in range(self.num_rows)]
        learned, data, plain = self._assemble(rows)
        state = jax.tree.map(np.array, self._start(learned))
        for row, concept in newcomers.items():
            known = saved.get(concept.spec.name)
            if known is not None:
                state = jax.tree.map(functools.partial(_with_row, row=row), state, known.state)
            step = 0 if known is None else known.step
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
        state, data, plain = place_by_concept((state, data, plain), self._mesh)
        if self._filled:
            taken = place_by_concept(self.mask(newcomers), self._mesh)
            self.state, self.data = self._replace((self.state, self.data), (state, data), taken)
        else:
            self.state, self.data, self._filled = state, data, True
        return plain

    def restart(self, learned: Mapping[int, Learned]) -> None:
        """Give occupied rows at step 0 other start values, by row."""
        now = jax.tree.map(np.array, self.state.learned)
        for row, start in learned.items():
            now = jax.tree.map(functools.partial(_with_row, row=row), now, start)
        state = place_by_concept(self._start(now), self._mesh)
        taken = place_by_concept(self.mask(learned), self._mesh)
        self.state = self._replace(self.state, state, taken)

    def mask(self, rows: Iterable[int]) -> np.ndarray:
        """``[C]`` bool: whether a row is among ``rows``."""
        return np.isin(np.arange(self.num_rows), list(rows))

    def saved_rows(self) -> list[SavedRow]:
        """All concepts under way, read from the device."""
        state = jax.tree.map(np.asarray, self.state)
        return [
            SavedRow(
                occupant.concept.record,
                jax.tree.map(lambda leaf, row=row: leaf[row], state),
                tuple(occupant.evaluations),
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


def _with_row(rows: np.ndarray, value: np.ndarray, *, row: int) -> np.ndarray:
    rows[row] = value
    return rows


def _make_replace(mesh: Mesh) -> Callable[[Any, Any, jax.Array], Any]:
    """``(old, new, taken [C]) -> rows of new where taken, else of old``; old is donated."""

    def replace(old: Any, new: Any, taken: jax.Array) -> Any:
        def one(before: jax.Array, after: jax.Array) -> jax.Array:
            return jnp.where(taken.reshape(-1, *[1] * (before.ndim - 1)), after, before)

        return jax.tree.map(one, old, new)

    rows = PartitionSpec(CONCEPT_AXIS)
    sharded = jax.shard_map(replace, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)
    return jax.jit(sharded, donate_argnums=0)
