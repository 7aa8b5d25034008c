"""The training loop, from top to bottom.

The compiled program has a number of rows, the slots. Each holds a concept with its own step
counter; when a concept is done, its row is given to the next one of the queue, which a background
thread has prepared. Between two such moments nothing but metrics leaves the device; the host reads
those of one dispatch while the device works on the next.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from catversion_jax.concepts import ConceptList, ConceptSpec
from catversion_jax.config import TrainConfig
from catversion_jax.diffusion import noise_schedule
from catversion_jax.errors import ConceptError
from catversion_jax.methods.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.runtime.compilation import watch_compilation
from catversion_jax.runtime.processes import own_part, wait_for_others
from catversion_jax.runtime.sharding import CONCEPT_AXIS, place_by_concept, replicated
from catversion_jax.training.early_stop import should_stop
from catversion_jax.training.feeder import Feeder
from catversion_jax.training.preparation import (
    PreparedConcept,
    describe_concept,
    prepare_concept,
)
from catversion_jax.training.queue_plan import QueuePlan, plan_queue
from catversion_jax.training.recorder import Dispatched, Recorder
from catversion_jax.training.run.checkpoint import Checkpoints, ConceptRecord
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.slots import Slot, Slots
from catversion_jax.training.start_values import first_adapted_layer, template_state
from catversion_jax.training.state import ConceptData, make_optimizer
from catversion_jax.training.step import (
    make_eval_step,
    make_train_step,
    steps_per_dispatch,
)
from catversion_jax.training.validation import SampleGrids

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """Names of the concepts that have a file, the reasons of those that were given up, and whether
    the run was asked to stop before the others were done.
    """

    finished: tuple[str, ...]
    failures: Mapping[str, str]
    interrupted: bool = False


def train(
    config: TrainConfig,
    backbone: Backbone,
    concepts: ConceptList,
    mesh: Mesh,
    stop: threading.Event | None = None,
) -> RunOutcome:
    """Train every concept that is not done yet; continue what ``config.output_dir`` holds.

    Once ``stop`` is set, in any of the processes, or a file ``STOP`` appears in ``output_dir``,
    everything under way is saved and the function returns.

    Raises:
      CatVersionError: the options contradict the model or the run in ``output_dir``, or it is not
      writable, or another process writes there.
    """
    run = RunDirectory(config)
    with run.lock():
        run.open(backbone.name, backbone.text_encoder_sha256)
        run.clear_leftovers()
        failures = {problem.name: problem.message for problem in concepts.problems}
        specs, records = {}, {}
        for spec in concepts.concepts:
            try:
                records[spec.name] = describe_concept(spec, backbone, config)
                specs[spec.name] = spec
            except ConceptError as error:
                failures[spec.name] = str(error)
        plan = plan_queue(records, run, template_state(config, backbone))
        wait_for_others("every process has read what was done before")
        own = tuple(own_part(plan.names))
        for name in specs:
            if run.has_failed(name) and run.is_done(name):
                run.clear_failure(name)
        if run.process == 0:
            for name, reason in failures.items():
                run.quarantine(name, reason)
        run.start_index(specs, failures)
        run.set_others(set(plan.names) - set(own))
        saved = {name: row for name, row in plan.saved.items() if name in own}
        plan = dataclasses.replace(plan, names=own, saved=saved)
        trainer = _Trainer(config, backbone, mesh, run, specs, records, plan)
        interrupted = trainer.run(stop or threading.Event())
        run.write_index()
        wait_for_others("every process is done")
        interrupted = interrupted or run.is_asked_to_stop(now=True)
        run.write_index()
    failures |= trainer.failures
    return RunOutcome(tuple(run.finished), {**run.quarantined, **failures}, interrupted)


class _Trainer:
    """Compiled programs, slots and queue of one run."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        mesh: Mesh,
        run: RunDirectory,
        specs: Mapping[str, ConceptSpec],
        records: Mapping[str, ConceptRecord],
        plan: QueuePlan,
    ):
        self.config, self.backbone, self.mesh, self.out = config, backbone, mesh, run
        self.specs, self.clock = specs, plan.clock
        self.queue = plan.names
        self.saved = dict(plan.saved)  # those that have no row again yet
        self.failures: dict[str, str] = {}
        first_layer = first_adapted_layer(config, backbone.num_text_layers)
        per_axis = mesh.shape[CONCEPT_AXIS]
        schedule = noise_schedule(backbone.noise_schedule)
        tx = make_optimizer(config)
        largest = {
            "max_images": max((len(spec.images) for spec in specs.values()), default=1),
            "max_prompts": max((len(record.prompts) for record in records.values()), default=1),
        }
        if config.concepts_per_device == "auto":
            raise ValueError("concepts_per_device=auto: planning.fitting.fitted says how many")
        per_device = min(config.concepts_per_device, max(1, -(-len(specs) // per_axis)))
        self.slots = Slots(per_device * per_axis, mesh, backbone, config, tx, **largest)
        self.max_steps = steps_per_dispatch(config)
        self.train_step = make_train_step(schedule, tx, mesh, config)
        self.eval_step = make_eval_step(schedule, mesh, config, first_layer)
        self.grids = SampleGrids(backbone, config)
        self.compiled = False
        self.pending: collections.deque[Dispatched] = collections.deque()

    def run(self, stop: threading.Event) -> bool:
        """Until the queue is empty; returns whether ``stop`` came first."""
        config, slots = self.config, self.slots
        total = len(self.specs) * config.max_train_steps
        to_do = len(self.queue) * config.max_train_steps
        with (
            tqdm(total=total, initial=total - to_do, unit="concept-step", desc="compiling") as bar,
            logging_redirect_tqdm([logging.getLogger()], tqdm_class=tqdm),
            Feeder(self.queue, self._prepare, ahead=slots.num_rows) as feeder,
            Checkpoints(self.out.checkpoint_folder, config.checkpoints_total_limit) as checkpoints,
            Recorder(self.out, config, bar) as self.recorder,
        ):
            # ------------------------------------------------------ the loop
            while True:
                self._retire()
                if self._fill(feeder):
                    continue
                if not slots.occupied:
                    return False
                self.out.refresh_index()
                self._train(self._steps_to_boundary())
                self._evaluate_due()
                self._write_due()
                if stop.is_set() and jax.process_count() > 1:
                    self.out.ask_to_stop()  # the others, which may not have heard
                interrupted = stop.is_set() or self.out.is_asked_to_stop()
                if interrupted or self.clock % config.checkpointing_steps == 0:
                    with self.recorder.timed("checkpoints"):
                        self._read_pending()  # what a checkpoint has seen is not done again
                        self.recorder.flush()
                        rows = [*slots.saved_rows(), *self.saved.values()]
                        checkpoints.save(self.clock, rows)
                if interrupted:
                    return True

    # ------------------------------------------------------------------ who has a row

    def _retire(self) -> None:
        """Export and let go whoever is done."""
        total = self.config.max_train_steps
        if any(slot.step >= total for slot in self.slots.occupied.values()):
            self._read_pending()
        ended = [
            slot
            for slot in self.slots.occupied.values()
            if slot.step >= total or slot.failed_step >= 0 or self._settled(slot)
        ]
        if not ended:
            return
        self._read_pending()
        with self.recorder.timed("export"):
            for slot, (learned, failed) in zip(ended, self.slots.exported(ended), strict=True):
                del self.slots.occupied[slot.row]
                self._finish(slot, learned, failed)

    def _settled(self, slot: Slot) -> bool:
        """Whether early stopping ends a concept at its present step."""
        evaluated_now = bool(slot.evaluations) and slot.evaluations[-1][0] == slot.step
        return evaluated_now and should_stop(slot.evaluations, self.config)

    def _finish(self, slot: Slot, learned: Learned, failed: int) -> None:
        name, record = slot.name, slot.concept.record
        if failed >= 0:
            file = self.out.concept_file(name, failed)
            record.save(file, learned, failed)
            self._give_up(
                name,
                f"{name}: the loss or the update was not finite at step {failed}. The state before "
                f"it is kept in {file.name}. Try a lower learning_rate with another output_dir.",
            )
            self.recorder.end(slot, "quarantined")
            return
        summary: dict[str, float] = _summary(slot)
        stopped = slot.step < self.config.max_train_steps
        if stopped:
            summary["stopped_early"] = slot.step
        self.out.write_summary(name, summary)
        record.save(self.out.concept_file(name), learned, slot.step)
        outcome = "stopped early" if stopped else "done"
        self.out.set_state(name, outcome, summary=summary)
        self.recorder.end(slot, outcome)

    def _fill(self, feeder: Feeder[Prepared]) -> bool:
        """Give the free rows to the next concepts, if there are any."""
        if feeder.exhausted or not self.slots.free:
            return False
        newcomers: dict[int, PreparedConcept] = {}
        with self.recorder.timed("waiting for concepts"):
            for row in self.slots.free:
                while (item := feeder.next()) is not None:
                    if item.concept is not None:
                        newcomers[row] = item.concept
                        break
                    self._give_up(item.name, item.problem)
                    self.recorder.skip()
        if not newcomers:
            return False
        # The programs of the first refill are compiled there.
        with self.recorder.timed("refilling" if self.compiled else "compiling"):
            plain_data = self.slots.fill(newcomers, self.saved, self.recorder.now)
            plain = self._evaluate(None, plain_data, newcomers)
            start = self._evaluate(self.slots.state.exported, self.slots.data, newcomers)
            for row, concept in newcomers.items():
                slot = self.slots.occupied[row]
                self.saved.pop(slot.name, None)
                slot.plain_loss = rounded(plain[row])
                if slot.step == 0:
                    slot.evaluations.append((0, rounded(start[row])))
                make_folder(self.out.concept(concept.spec.name))
                self.out.clear_failure(slot.name)
                self.out.set_state(slot.name, "running")
                self.recorder.begin(slot)
        return True

    def _prepare(self, name: str) -> Prepared:
        """In the feeder's thread."""
        try:
            return Prepared(name, prepare_concept(self.specs[name], self.backbone, self.config))
        except ConceptError as error:
            return Prepared(name, None, str(error))

    def _give_up(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        self.out.quarantine(name, reason)
        self.out.set_state(name, "quarantined", reason=reason)
        logger.warning("quarantined %s: %s", name, reason)

    # ------------------------------------------------------------------ what the device does

    def _steps_to_boundary(self) -> int:
        config = self.config
        own = [config.eval_steps, config.checkpointing_steps]
        if config.validation_steps:
            own.append(config.validation_steps)
        bounds = [
            self.max_steps,
            config.checkpointing_steps - self.clock % config.checkpointing_steps,
        ]
        for slot in self.slots.occupied.values():
            bounds += [interval - slot.step % interval for interval in own]
            bounds.append(config.max_train_steps - slot.step)
        return min(bounds)

    def _train(self, num_steps: int) -> None:
        """Dispatch some steps, then read what those before have reported."""
        count = jax.device_put(np.int32(num_steps), replicated(self.mesh))
        slots, started = self.slots, time.perf_counter()
        with jax.transfer_guard("disallow"), watch_compilation() as found:
            slots.state, metrics = self.train_step(
                slots.state, slots.data, self.backbone.text_encoder, self.backbone.unet, count
            )
        seconds = time.perf_counter() - started
        if not self.compiled:
            self.compiled = True
            self.recorder.add("compiling", seconds)
            logger.info("training step ready after %.0f s: %s", seconds, found)
        elif found.programs:
            logger.warning("the training step was compiled again, which took %.0f s", seconds)
        self._read_pending()  # of the dispatch before, while the device works on this one
        before = [(slot, slot.step) for slot in slots.occupied.values()]
        for slot, step in before:
            slot.step = step + num_steps
        self.clock += num_steps
        self.pending.append(Dispatched(self.clock, num_steps, before, metrics))

    def _evaluate_due(self) -> None:
        config = self.config
        due = [
            slot
            for slot in self.slots.occupied.values()
            if slot.step % config.eval_steps == 0 or slot.step == config.max_train_steps
        ]
        if not due:
            return
        self._read_pending(due)
        with self.recorder.timed("evaluation"):
            rows = [slot.row for slot in due]
            losses = self._evaluate(self.slots.state.exported, self.slots.data, rows)
        for slot in due:
            slot.evaluations.append((slot.step, rounded(losses[slot.row])))
            self.recorder.write_row(slot, slot.step, slot.evaluations[-1][1])

    def _evaluate(
        self, learned: Learned | None, data: ConceptData, rows: Iterable[int]
    ) -> np.ndarray:
        """Evaluation losses of ``rows``, by row."""
        due = place_by_concept(self.slots.mask(rows), self.mesh)
        unet = self.backbone.unet
        return np.asarray(self.eval_step(learned, data, due, self.backbone.text_encoder, unet))

    # ------------------------------------------------------------------ what the host does

    def _read_pending(self, evaluated: Sequence[Slot] = ()) -> None:
        """Losses of what was dispatched, waiting for it. Rows of ``evaluated`` at their present
        step are left to the evaluation, which has more to write there.
        """
        while self.pending:
            self.recorder.read(self.pending.popleft(), evaluated)

    def _write_due(self) -> None:
        """Intermediate files and sample grids."""
        config = self.config
        every = config.validation_steps if config.validation_prompt else None
        slots = list(self.slots.occupied.values())
        saved = [
            slot
            for slot in slots
            if slot.step % config.checkpointing_steps == 0 and slot.step < config.max_train_steps
        ]
        drawn = [
            slot
            for slot in slots
            if every and (slot.step % every == 0 or slot.step == config.max_train_steps)
        ]
        if not saved and not drawn:
            return
        self._read_pending()
        with self.recorder.timed("files and grids"):
            for slot, (learned, failed) in zip(saved, self.slots.exported(saved), strict=True):
                if failed < 0:
                    file = self.out.concept_file(slot.name, slot.step)
                    slot.concept.record.save(file, learned, slot.step)
            for slot, (learned, _) in zip(drawn, self.slots.exported(drawn), strict=True):
                path = self.out.concept(slot.name) / "samples" / f"{slot.step:06d}.png"
                self.grids.write(path, slot.concept, learned, slot.step)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the feeder gives: a concept, or why it cannot be used."""

    name: str
    concept: PreparedConcept | None
    problem: str = ""


def _summary(slot: Slot) -> dict[str, float]:
    learned = slot.evaluations[-1][1]
    if learned >= slot.plain_loss:
        logger.warning(
            f"{slot.name}: its evaluation loss {learned} is not below the plain model's "
            f"{slot.plain_loss}, so it learned nothing useful. Train longer, try another "
            "learning_rate or init, and check that the base class suits the images."
        )
    return {"eval_loss": learned, "plain_eval_loss": slot.plain_loss}


def rounded(loss: float) -> float:
    """As files show it: what a resumed run reads is what an uninterrupted one goes by."""
    return float(f"{loss:.6g}")
