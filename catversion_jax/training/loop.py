"""The training loop, from top to bottom.

Concepts are trained in packs: as many at once as the mesh has rows, one pack after the other, all
with the same compiled programs. Inside a pack nothing but metrics leaves the device; the host reads
those of one dispatch while the device works on the next.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from catversion_jax.atomic_files import make_folder
from catversion_jax.concepts import ConceptList, ConceptSpec
from catversion_jax.config import TrainConfig
from catversion_jax.diffusion import noise_schedule
from catversion_jax.errors import ConceptError
from catversion_jax.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.sharding import CONCEPT_AXIS, place_by_concept, replicated
from catversion_jax.training import checkpoint
from catversion_jax.training.checkpoint import ConceptRecord
from catversion_jax.training.metrics import MetricsRecorder
from catversion_jax.training.pack import (
    PreparedConcept,
    assemble_pack,
    describe_concept,
    prepare_concept,
)
from catversion_jax.training.planning import Pack, plan_packs
from catversion_jax.training.run_directory import RunDirectory
from catversion_jax.training.start_values import first_adapted_layer
from catversion_jax.training.state import (
    ConceptData,
    TrainState,
    create_train_state,
    make_optimizer,
)
from catversion_jax.training.step import (
    StepMetrics,
    make_eval_step,
    make_train_step,
    steps_per_dispatch,
)
from catversion_jax.training.validation import SampleGrids

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Names of the concepts that have a file, and the reasons of those that do not."""

    finished: tuple[str, ...]
    failures: Mapping[str, str]


def train(
    config: TrainConfig, backbone: Backbone, concepts: ConceptList, mesh: Mesh
) -> TrainResult:
    """Train every concept that is not done yet; continue what ``config.output_dir`` holds.

    Raises:
      CatVersionError: the options contradict the model or the run in ``output_dir``, or it is not
      writable.
    """
    run = RunDirectory(config)
    run.open(backbone.name, backbone.text_encoder_sha256)
    failures = {problem.name: problem.message for problem in concepts.problems}
    specs, records = {}, {}
    for spec in concepts.concepts:
        try:
            records[spec.name] = describe_concept(spec, backbone, config)
            specs[spec.name] = spec
        except ConceptError as error:
            failures[spec.name] = str(error)
    trainer = _Trainer(config, backbone, mesh, run, specs, records)
    packs = plan_packs(records, run, trainer.num_rows)
    for name in specs:
        if run.has_failed(name) and run.is_done(name):
            run.clear_failure(name)
    for name, reason in failures.items():
        run.quarantine(name, reason)

    names = [*failures, *specs]
    total = len(specs) * config.max_train_steps
    to_do = sum(len(pack.names) for pack in packs) * config.max_train_steps
    with (
        tqdm(total=total, initial=total - to_do, unit="concept-step", desc="compiling") as progress,
        logging_redirect_tqdm([logging.getLogger()], tqdm_class=tqdm),
    ):
        for pack in packs:
            run.write_index(names, failures)
            failures |= trainer.run_pack(pack, progress)
    run.write_index(names, failures)
    return TrainResult(tuple(name for name in specs if name not in failures), failures)


class _Trainer:
    """What all packs of a run share: shapes, compiled programs, frozen networks."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        mesh: Mesh,
        run: RunDirectory,
        specs: Mapping[str, ConceptSpec],
        records: Mapping[str, ConceptRecord],
    ):
        self.config, self.backbone, self.mesh, self.run = config, backbone, mesh, run
        self.specs = specs
        first_layer = first_adapted_layer(config, backbone.num_text_layers)
        per_axis = mesh.shape[CONCEPT_AXIS]
        wanted = -(-len(specs) // per_axis) * per_axis
        self.num_rows = min(config.concepts_per_device * per_axis, max(wanted, per_axis))
        self.max_images = max((len(spec.images) for spec in specs.values()), default=1)
        self.max_prompts = max((len(record.prompts) for record in records.values()), default=1)
        schedule = noise_schedule(backbone.noise_schedule)
        self.tx = make_optimizer(config)
        self.max_steps = steps_per_dispatch(config)
        self.train_step = make_train_step(schedule, self.tx, mesh, config)
        self.eval_step = make_eval_step(schedule, mesh, config, first_layer)
        self.grids = SampleGrids(backbone, config)
        self.compiled = False
        self.failed: set[str] = set()
        # What the progress bar says; ``mark`` is when the last dispatch was read, None after other
        # work.
        self.mark: float | None = None
        self.rate, self.status = 0.0, ""

    # ------------------------------------------------------------------ one pack

    def run_pack(self, pack: Pack, progress: tqdm) -> dict[str, str]:
        """Train one pack to the end and export it; returns the failures."""
        config, total = self.config, self.config.max_train_steps
        prepared, failures = self._prepare(pack)
        progress.update(len(failures) * total)
        if not prepared:
            return failures
        with checkpoint.Checkpoints(pack.folder, config.checkpoints_total_limit) as checkpoints:
            step, state, data, plain_loss = self._start(prepared, pack.restore_from)
            progress.update(step * len(prepared))
            recorder = MetricsRecorder(
                {concept.spec.name: self.run.concept(concept.spec.name) for concept in prepared},
                self.run.jsonl,
                self.run.logs if config.report_to == "tensorboard" else None,
                start_step=step,
            )
            records = [concept.record for concept in prepared]
            loss = self._evaluate(state.exported, data)
            pending = collections.deque([_Dispatched(0, 0, None, loss)] if step == 0 else [])

            def record_pending() -> None:
                while pending:
                    self._record(pending.popleft(), recorder, progress)

            # ------------------------------------------------------ the loop
            while step < total:
                num_steps = self._steps_to_boundary(step)
                state, metrics = self._dispatch(state, data, num_steps)
                step += num_steps
                evaluate = step % config.eval_steps == 0 or step == total
                if evaluate:
                    loss = self._evaluate(state.exported, data)
                record_pending()  # of the dispatch before, while the device works on this one
                pending.append(_Dispatched(step, num_steps, metrics, loss if evaluate else None))
                if step % config.checkpointing_steps == 0 or step == total:
                    record_pending()  # what a checkpoint has seen is not done again
                    if step < total:
                        # First: where it fails, no checkpoint is being written meanwhile.
                        self._export(prepared, state, step)
                    checkpoints.save(step, state, records)
                every = config.validation_steps if config.validation_prompt else None
                if every and (step % every == 0 or step == total):
                    record_pending()
                    self._write_grids(prepared, state, step)
            # ------------------------------------------------------ the end
            recorder.close()
        losses = (np.asarray(plain_loss), np.asarray(loss))
        return failures | self._export(prepared, state, None, losses)

    def _prepare(self, pack: Pack) -> tuple[list[PreparedConcept], dict[str, str]]:
        prepared: list[PreparedConcept] = []
        failures: dict[str, str] = {}
        for name in pack.names:
            spec = self.specs[name]
            try:
                prepared.append(prepare_concept(spec, self.backbone, self.config))
                make_folder(self.run.concept(spec.name))
                self.run.clear_failure(spec.name)
            except ConceptError as error:
                failures[spec.name] = str(error)
                self.run.quarantine(spec.name, str(error))
                logger.warning("quarantined %s: %s", spec.name, error)
        return prepared, failures

    def _start(
        self, prepared: Sequence[PreparedConcept], restore_from: Path | None
    ) -> tuple[int, TrainState, ConceptData, jax.Array]:
        """Rows on the mesh, at step 0 or where the newest checkpoint left them, and the plain
        model's losses.
        """
        residual, data, plain = assemble_pack(
            prepared,
            self.backbone,
            self.config,
            num_rows=self.num_rows,
            max_images=self.max_images,
            max_prompts=self.max_prompts,
        )
        plain_loss = self._evaluate(None, place_by_concept(plain, self.mesh))
        data = place_by_concept(data, self.mesh)
        averaged = self.config.ema_decay is not None
        state = create_train_state(residual, self.tx, averaged=averaged)
        state = jax.tree.map(np.asarray, state)
        step = 0
        if restore_from is not None:
            step, rows, records = checkpoint.restore_latest(restore_from, state)
            order = [record.name for record in records]
            taken = [order.index(concept.spec.name) for concept in prepared]
            taken += [taken[0]] * (self.num_rows - len(taken))
            state = jax.tree.map(lambda leaf: leaf[np.array(taken)], rows)
            logger.info("resumed %d concepts at step %d", len(prepared), step)
        return step, place_by_concept(state, self.mesh), data, plain_loss

    def _steps_to_boundary(self, step: int) -> int:
        config = self.config
        intervals = [config.eval_steps, config.checkpointing_steps, config.logging_steps]
        if config.validation_steps:
            intervals.append(config.validation_steps)
        to_next = min(interval - step % interval for interval in intervals)
        return min(self.max_steps, to_next, config.max_train_steps - step)

    def _dispatch(
        self, state: TrainState, data: ConceptData, num_steps: int
    ) -> tuple[TrainState, StepMetrics]:
        count = jax.device_put(np.int32(num_steps), replicated(self.mesh))
        started = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, metrics = self.train_step(
                state, data, self.backbone.text_encoder, self.backbone.unet, count
            )
        if not self.compiled:
            self.compiled = True
            logger.info("compiled the training step in %.0f s", time.perf_counter() - started)
        return state, metrics

    def _evaluate(self, residual: Learned | None, data: ConceptData) -> jax.Array:
        return self.eval_step(residual, data, self.backbone.text_encoder, self.backbone.unet)

    # ------------------------------------------------------------------ what the host does

    def _record(self, done: _Dispatched, recorder: MetricsRecorder, progress: tqdm) -> None:
        names = recorder.names
        if done.metrics is not None:
            losses = np.asarray(done.metrics.losses)[: done.num_steps]
            for name, failed in zip(names, np.asarray(done.metrics.failed_step), strict=False):
                if failed >= 0 and name not in self.failed:
                    self.failed.add(name)
                    logger.warning(f"{name}: not finite at step {failed}; the others go on")
            recorder.add_losses({name: losses[:, row].tolist() for row, name in enumerate(names)})
            progress.set_description("training", refresh=False)
            progress.update(done.num_steps * len(names))
        rate = self._concept_steps_per_s(done.num_steps * len(names))
        concepts_per_hour = 3600 * rate / self.config.max_train_steps
        evaluated = None
        if done.eval_loss is not None:
            evaluated = dict(zip(names, np.asarray(done.eval_loss).tolist(), strict=False))
            mean = np.mean([evaluated[name] for name in names])
            self.status = f"eval loss {mean:.4f}"
        if rate:
            progress.set_postfix_str(f"{self.status}, {concepts_per_hour:.0f} concepts/h")
        if evaluated is not None or done.step % self.config.logging_steps == 0:
            throughput = {
                "concept_steps_per_s": round(rate, 3),
                "concepts_per_hour": round(concepts_per_hour, 1),
            }
            recorder.write_row(done.step, evaluated, throughput)

    def _concept_steps_per_s(self, num_concept_steps: int) -> float:
        """Speed of the compiled step since the last record; compilation and grids are left out."""
        now = time.perf_counter()
        if self.mark is not None and num_concept_steps:
            latest = num_concept_steps / (now - self.mark)
            self.rate = latest if self.rate == 0 else 0.7 * self.rate + 0.3 * latest
        self.mark = now
        return self.rate

    def _export(
        self,
        prepared: Sequence[PreparedConcept],
        state: TrainState,
        step: int | None,
        losses: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> dict[str, str]:
        """Concept files of all healthy rows (``step=None``: the final ones); quarantines the
        others.

        ``losses`` are the evaluation losses ``[C]`` of the plain model and of the concepts.
        """
        rows = jax.tree.map(np.asarray, dataclasses.replace(state, opt_state=()))
        failures = {}
        for row, concept in enumerate(prepared):
            name, residual = concept.spec.name, _row(rows.exported, row)
            if rows.failed_step[row] < 0:
                reached = self.config.max_train_steps if step is None else step
                if losses:
                    self.run.write_summary(name, _summary(name, row, losses))
                concept.record.save(self.run.concept_file(name, step), residual, reached)
                continue
            failed = int(rows.failed_step[row])
            reason = (
                f"{name}: the loss or the update was not finite at step {failed}. The state before "
                f"it is kept in {self.run.concept_file(name, failed).name}. Try a lower "
                "learning_rate with another output_dir."
            )
            concept.record.save(self.run.concept_file(name, failed), residual, failed)
            self.run.quarantine(name, reason)
            failures[name] = reason
        return failures

    def _write_grids(
        self, prepared: Sequence[PreparedConcept], state: TrainState, step: int
    ) -> None:
        residuals = jax.tree.map(np.asarray, state.exported)
        for row, concept in enumerate(prepared):
            path = self.run.concept(concept.spec.name) / "samples" / f"{step:06d}.png"
            self.grids.write(path, concept, _row(residuals, row), step)
        self.mark = None


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """Results of one dispatch, still on their way from the device."""

    step: int
    num_steps: int
    metrics: StepMetrics | None
    eval_loss: jax.Array | None


def _summary(name: str, row: int, losses: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    plain, learned = (float(f"{loss[row]:.6g}") for loss in losses)
    if learned >= plain:
        logger.warning(
            f"{name}: its evaluation loss {learned} is not below the plain model's {plain}, so it "
            "learned nothing useful. Train longer, try another learning_rate or init, and check "
            "that the base class suits the images."
        )
    return {"eval_loss": learned, "plain_eval_loss": plain}


def _row(residual: Learned, row: int) -> Learned:
    return jax.tree.map(lambda leaf: leaf[row], residual)
