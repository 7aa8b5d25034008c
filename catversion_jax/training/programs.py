"""The compiled programs of a run, with the frozen networks that they read."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from catversion_jax.config import DeviceOptions, ObjectiveOptions
from catversion_jax.diffusion import noise_schedule
from catversion_jax.methods.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.executables import StoredProgram
from catversion_jax.runtime.sharding import place_by_concept, replicated
from catversion_jax.training.eval_step import evaluation_step, make_eval_programs
from catversion_jax.training.rows import Rows
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import (
    StepMetrics,
    make_train_step,
    steps_per_dispatch,
)


class Programs:
    """The training step of all rows, and the evaluation loss of some of them.

    Args:
      backbone: the frozen networks and the noise schedule.
      tx: the optimizer of one concept.
      mesh: of this process.
      objective: the batch and its loss.
      devices: how the training step is spread and dispatched.
      ema_decay: of the moving average of what is learned; None where none is kept.
      first_layers: of each encoder the lowest layer whose output depends on what is learned.
      num_eval_samples: pairs of noise and timestep in the evaluation loss.
      decided_by: what else decides the programs, as text, such as the options behind ``tx``: under
        that name they are kept for the next start. None keeps none.

    Attributes:
      max_steps: largest number of steps of one dispatch.
    """

    def __init__(
        self,
        backbone: Backbone,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        objective: ObjectiveOptions,
        devices: DeviceOptions,
        *,
        ema_decay: float | None,
        first_layers: Sequence[int],
        num_eval_samples: int,
        decided_by: str | None = None,
    ):
        schedule = noise_schedule(backbone.noise_schedule)
        self.max_steps = steps_per_dispatch(devices.steps_per_dispatch)
        self._text_encoders, self._unet, self._mesh = backbone.text_encoders, backbone.unet, mesh
        train_step = make_train_step(schedule, tx, mesh, objective, devices, ema_decay=ema_decay)
        encode, measure = make_eval_programs(
            schedule,
            mesh,
            first_layers=first_layers,
            num_samples=num_eval_samples,
            batch_size=objective.train_batch_size,
        )
        if decided_by is not None:
            own = (objective, devices, ema_decay, tuple(first_layers), num_eval_samples)
            decided_by = f"{decided_by} {own} {backbone.noise_schedule} {mesh}"
            train_step = StoredProgram(train_step, "train", decided_by, varying=2, donated=(0,))
            encode = StoredProgram(encode, "encode", decided_by, varying=2)
            measure = StoredProgram(measure, "evaluate", decided_by, varying=2)
        self._train_step = train_step
        self._eval_step = evaluation_step(encode, measure)

    def train(self, rows: Rows, num_steps: int) -> StepMetrics:
        """Start ``num_steps`` steps of all rows; returns what they will report, before they end."""
        count = jax.device_put(np.int32(num_steps), replicated(self._mesh))
        with jax.transfer_guard("disallow"):
            rows.state, metrics = self._train_step(
                rows.state, rows.data, self._text_encoders, self._unet, count
            )
        return metrics

    def evaluate(
        self, learned: Learned | None, data: ConceptData, is_there: np.ndarray
    ) -> np.ndarray:
        """Evaluation losses ``[G]`` of one row of each device; NaN where there is none.

        Args:
          learned: what those rows have learned; None for the plain model's losses.
          data: what their concepts are evaluated on.
          is_there: ``[G]`` bool, which devices have a row to evaluate.
        """
        is_due = place_by_concept(is_there, self._mesh)
        return np.asarray(self._eval_step(learned, data, is_due, self._text_encoders, self._unet))
