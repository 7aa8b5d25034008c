"""A training loop with all that it works with: rows, programs, checkpoints, what it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh
from tqdm import tqdm

from catversion_jax.config import (
    DataOptions,
    DeviceOptions,
    MethodOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RecordingOptions,
)
from catversion_jax.methods.table import method_for
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.executables import source_of
from catversion_jax.training.feeder import Feeder
from catversion_jax.training.loop import Prepared, TrainingLoop
from catversion_jax.training.programs import Programs
from catversion_jax.training.queue_plan import QueuePlan
from catversion_jax.training.recorder import Recorder
from catversion_jax.training.rows import Rows
from catversion_jax.training.run.checkpoint import Checkpoints
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.state import make_optimizer
from catversion_jax.training.validation import SampleGrids


@contextlib.contextmanager
def opened_loop(
    data: DataOptions,
    method: MethodOptions,
    objective: ObjectiveOptions,
    optimizer: OptimizerOptions,
    devices: DeviceOptions,
    recording: RecordingOptions,
    *,
    backbone: Backbone,
    mesh: Mesh,
    run: RunDirectory,
    feeder: Feeder[Prepared],
    plan: QueuePlan,
    first_layers: Sequence[int],
    bar: tqdm,
    num_rows: int,
    max_images: int,
    max_prompts: int,
) -> Iterator[TrainingLoop]:
    """Put a loop together; leaving the block ends its threads and completes its files.

    The options come in their groups; the other arguments are those of
    :class:`~catversion_jax.training.loop.TrainingLoop`, :class:`~catversion_jax.training.rows.Rows`
    and :class:`~catversion_jax.training.recorder.Recorder`.
    """
    tx = make_optimizer(optimizer, method)
    averaged = optimizer.ema_decay is not None
    rows = Rows(
        num_rows,
        mesh,
        backbone,
        objective,
        tx,
        averaged=averaged,
        max_images=max_images,
        max_prompts=max_prompts,
    )
    own = source_of(method_for(method))  # which need not be of this package
    programs = Programs(
        backbone,
        tx,
        mesh,
        objective,
        devices,
        ema_decay=optimizer.ema_decay,
        first_layers=first_layers,
        num_eval_samples=recording.num_eval_samples,
        decided_by=own and f"{own} {optimizer} {method}",
    )
    grids = SampleGrids(backbone, recording, data.resolution or backbone.default_resolution)
    with (
        feeder,
        Checkpoints(run.checkpoint_folder, recording.checkpoints_total_limit) as checkpoints,
        Recorder(run, recording, optimizer.max_train_steps, bar) as recorder,
    ):
        yield TrainingLoop(
            rows=rows,
            programs=programs,
            grids=grids,
            feeder=feeder,
            saved=plan.saved,
            clock=plan.clock,
            run=run,
            recorder=recorder,
            checkpoints=checkpoints,
            optimizer=optimizer,
            recording=recording,
        )
