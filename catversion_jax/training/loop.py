"""The training loop, from top to bottom.

The compiled program has a number of rows. Each holds a concept with its own step counter; when a
concept is done, its row is given to the next one of the queue, which a background thread has
prepared. Between two such moments nothing but metrics leaves the device; the host reads those of
one dispatch while the device works on the next.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import jax

from catversion_jax.config import OptimizerOptions, RecordingOptions
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.runtime.compilation import watch_compilation
from catversion_jax.runtime.regular_files import make_way
from catversion_jax.training.early_stop import should_stop
from catversion_jax.training.feeder import Feeder
from catversion_jax.training.preparation import PreparedConcept
from catversion_jax.training.programs import Programs
from catversion_jax.training.recorder import Dispatched, Recorder, rounded, write_ends
from catversion_jax.training.rows import Newcomers, Occupant, Rows
from catversion_jax.training.run import names
from catversion_jax.training.run.checkpoint import Checkpoints, SavedRow
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.run.summary import finished_state
from catversion_jax.training.validation import SampleGrids

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the feeder gives: a concept, or why it cannot be used."""

    name: str
    concept: PreparedConcept | None
    problem: str = ""


class TrainingLoop:
    """Trains a queue of concepts on the rows of one compiled program.

    Args:
      rows: of the program, all of them free.
      programs: what the device runs.
      grids: what draws sample grids.
      feeder: the queue.
      saved: states of those of the queue that were under way, by name.
      clock: steps that the run's program has made; numbers the checkpoints.
      run: the folder of the run.
      recorder: what writes losses and progress.
      checkpoints: what writes checkpoints.
      optimizer: number of steps and early stopping.
      recording: how often what is written.

    Attributes:
      failures: reasons of the concepts that were given up, by name.
      checkpoints: what writes checkpoints.
    """

    def __init__(
        self,
        rows: Rows,
        programs: Programs,
        grids: SampleGrids,
        feeder: Feeder[Prepared],
        saved: Mapping[str, SavedRow],
        clock: int,
        run: RunDirectory,
        recorder: Recorder,
        checkpoints: Checkpoints,
        optimizer: OptimizerOptions,
        recording: RecordingOptions,
    ):
        self.failures: dict[str, str] = {}
        self._rows, self._programs, self._grids, self._feeder = rows, programs, grids, feeder
        self._saved = dict(saved)  # those that have no row again yet
        self._clock, self._out, self._recorder = clock, run, recorder
        self._first_clock = clock
        self.checkpoints = checkpoints
        self._optimizer, self._recording = optimizer, recording
        self._compiled = False
        self._pending: collections.deque[Dispatched] = collections.deque()

    def run(self, stop: threading.Event) -> bool:
        """Train until the queue is empty, or until ``stop`` is set or a file STOP appears.

        Returns:
          Whether it was asked to stop; what is under way is then in a checkpoint.
        """
        while not self._is_asked_to_stop(stop):
            if not self.advance(stop):
                return False
        self.save()
        return True

    def advance(self, stop: threading.Event) -> bool:
        """Do one piece of work, if there is any: fill rows, or train to the next boundary."""
        self._retire()
        if self._fill():
            return True
        if not self._rows.occupied:
            return False
        self._out.refresh_index()
        self._train(self._steps_to_boundary())
        self._evaluate_due()
        self._write_due(stop)
        if self._clock % self._recording.checkpointing_steps == 0:
            self._save_checkpoint()
        return True

    def wait(self) -> None:
        """Return once the device has done what it was told; :meth:`advance` does not wait."""
        jax.block_until_ready([dispatched.metrics for dispatched in self._pending])

    def save(self) -> None:
        """Save everything under way, if any step was made."""
        if self._clock > self._first_clock:
            self._save_checkpoint()

    @property
    def under_way(self) -> Sequence[Occupant]:
        """The concepts that have a row."""
        return list(self._rows.occupied.values())

    def withdraw(self, name: str) -> None:
        """Take a concept that is not finished out of its row, if it has one."""
        for occupant in self.under_way:
            if occupant.name == name:
                self._read_pending()
                del self._rows.occupied[occupant.row]
                self._out.forget(name)
                self._recorder.end(occupant, "withdrawn")
        self._saved.pop(name, None)

    def write_files(self, occupants: Sequence[Occupant]) -> None:
        """Write what concepts have learned so far as the concept files of their steps."""
        states = self._rows.exported(occupants)
        for occupant, (learned, failed) in zip(occupants, states, strict=True):
            if failed < 0:
                file = self._out.concept_file(occupant.name, occupant.step)
                make_way(file)
                occupant.concept.record.save(file, learned, occupant.step)

    def _is_asked_to_stop(self, stop: threading.Event) -> bool:
        if stop.is_set() and jax.process_count() > 1:
            self._out.ask_to_stop()  # the other processes, which may not have heard
        return stop.is_set() or self._out.is_asked_to_stop()

    # ------------------------------------------------------------------ who has a row

    def _retire(self) -> None:
        """Export the concepts that are done and free their rows."""
        occupants = list(self._rows.occupied.values())
        if any(occupant.step >= occupant.updates for occupant in occupants):
            self._read_pending()
        ended = [occupant for occupant in occupants if self._has_ended(occupant)]
        if not ended:
            return
        self._read_pending()
        with self._recorder.timed("export"):
            states = self._rows.exported(ended)
            written = write_ends(self._out, ended, states)
            for occupant, (_, failed), summary in zip(ended, states, written, strict=True):
                del self._rows.occupied[occupant.row]
                self._end(occupant, failed, summary)

    def _has_ended(self, occupant: Occupant) -> bool:
        """Whether a concept has made all its steps, has failed, or is stopped early."""
        if occupant.step >= occupant.updates or occupant.failed_step >= 0:
            return True
        if occupant.concept.record.has_larger_budget:
            return False  # the rule would end it where it had ended when it failed
        losses = occupant.evaluations
        evaluated_now = bool(losses) and losses[-1][0] == occupant.step
        return evaluated_now and should_stop(losses, self._optimizer)

    def _end(self, occupant: Occupant, failed: int, summary: dict[str, float]) -> None:
        """Note what has become of a concept; ``failed`` is -1 or a step."""
        name, outcome = occupant.name, "quarantined"
        if failed >= 0:
            file = self._out.concept_file(name, failed)
            self._give_up(
                name,
                f"{name}: the loss or the update was not finite at step {failed}. The state before "
                f"it is kept in {file.name}. Try a lower learning_rate with another output_dir.",
            )
        else:
            outcome = finished_state(summary)
            self._out.set_state(name, outcome, summary=summary)
        self._recorder.end(occupant, outcome)

    def _fill(self) -> bool:
        """Give the free rows to the next concepts of the queue, if there are any."""
        if self._feeder.exhausted or not self._rows.free:
            return False
        newcomers: dict[int, PreparedConcept] = {}
        with self._recorder.timed("waiting for concepts"):
            free = self._rows.free
            while free and (item := self._feeder.next()) is not None:
                if item.concept is None:
                    self._give_up(item.name, item.problem)
                    self._recorder.skip()
                    continue
                saved = self._saved.get(item.name)
                row = free[0] if saved is None or saved.row not in free else saved.row
                free.remove(row)
                newcomers[row] = item.concept
        if not newcomers:
            return False
        newcomers = dict(sorted(newcomers.items()))
        self._rows.make_room(newcomers.values())
        for group in self._rows.groups(newcomers):
            self._admit({row: newcomers[row] for row in group})
        return True

    def _admit(self, concepts: Mapping[int, PreparedConcept]) -> None:
        """Give rows, at most one on each device, to concepts, and evaluate their start."""
        # The programs of the first refill are compiled there.
        refilling, evaluation = (
            ("refilling", "evaluation") if self._compiled else ("compiling", "compiling")
        )
        with self._recorder.timed(refilling):
            newcomers = self._rows.send(concepts, self._saved)
        with self._recorder.timed(evaluation):
            plain = self._start_losses(newcomers, of_plain_model=True)
            start = self._start_losses(newcomers)
            if poor := self._bad_predictions(newcomers, plain, start):
                again = {concept.spec.name for concept in poor.values()}
                saved = {name: row for name, row in self._saved.items() if name not in again}
                newcomers = self._rows.send({**concepts, **poor}, saved)
                start = self._start_losses(newcomers)
        with self._recorder.timed(refilling):
            self._rows.put(newcomers, self._recorder.now)
            self._begin(concepts, plain, start)

    def _begin(
        self, rows: Iterable[int], plain: Mapping[int, float], start: Mapping[int, float]
    ) -> None:
        """Open what is written about concepts that have got rows."""
        for row in rows:
            occupant = self._rows.occupied[row]
            self._saved.pop(occupant.name, None)
            occupant.plain_loss = rounded(plain[row])
            if not occupant.evaluations:
                occupant.evaluations.append((0, rounded(start[row])))
            make_way(self._out.concept(occupant.name), for_folder=True)
            make_folder(self._out.concept(occupant.name))
            self._out.clear_failure(occupant.name)
            self._out.set_state(occupant.name, "running")
            self._recorder.begin(occupant)

    def _start_losses(
        self, newcomers: Newcomers, *, of_plain_model: bool = False
    ) -> dict[int, float]:
        """Evaluation losses by row: of what newcomers begin with, or of the plain model."""
        given = (newcomers.state.exported, newcomers.data)
        learned, data = (None, newcomers.plain) if of_plain_model else given
        losses = self._programs.evaluate(learned, data, newcomers.is_there)
        return self._rows.by_row(newcomers.concepts, losses)

    def _bad_predictions(
        self, newcomers: Newcomers, plain: Mapping[int, float], start: Mapping[int, float]
    ) -> dict[int, PreparedConcept]:
        """The new concepts whose prediction is no better than the plain model, by row: as they
        start from the class word.
        """
        poor = {
            row: dataclasses.replace(concept, learned=concept.own_start)
            for row, concept in newcomers.concepts.items()
            if concept.own_start is not None
            and newcomers.step(row) == 0
            and not start[row] < plain[row]
        }
        for row, concept in poor.items():
            logger.warning(
                f"{concept.spec.name}: the predicted start has an evaluation loss of "
                f"{rounded(start[row])}, not below the plain model's {rounded(plain[row])}: it "
                "starts as with init=class_word."
            )
        return poor

    def _give_up(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        self._out.quarantine(name, reason)
        self._out.set_state(name, "quarantined", reason=reason)
        logger.warning("quarantined %s: %s", name, reason)

    # ------------------------------------------------------------------ what the device does

    def _steps_to_boundary(self) -> int:
        """Steps until something has to be evaluated, written, saved or replaced."""
        options = self._recording
        intervals = [options.eval_steps, options.checkpointing_steps]
        if options.validation_steps:
            intervals.append(options.validation_steps)
        bounds = [
            self._programs.max_steps,
            options.checkpointing_steps - self._clock % options.checkpointing_steps,
        ]
        for occupant in self._rows.occupied.values():
            bounds += [interval - occupant.step % interval for interval in intervals]
            bounds.append(occupant.updates - occupant.step)
        return min(bounds)

    def _train(self, num_steps: int) -> None:
        """Dispatch some steps, then read what the dispatch before has reported."""
        started = time.perf_counter()
        with watch_compilation() as found:
            metrics = self._programs.train(self._rows, num_steps)
        seconds = time.perf_counter() - started
        if not self._compiled:
            self._compiled = True
            self._recorder.add("compiling", seconds)
            logger.info("training step ready after %.0f s: %s", seconds, found)
        elif found.programs:
            logger.warning("the training step was compiled again, which took %.0f s", seconds)
        self._read_pending()  # while the device works on this dispatch
        before = [(occupant, occupant.step) for occupant in self._rows.occupied.values()]
        for occupant, step in before:
            occupant.step = step + num_steps
        self._clock += num_steps
        self._pending.append(Dispatched(self._clock, num_steps, before, metrics))

    def _evaluate_due(self) -> None:
        """Evaluate the concepts whose step asks for it."""
        due = self._at_every(self._recording.eval_steps)
        if not due:
            return
        self._read_pending(due)
        losses: dict[int, float] = {}
        with self._recorder.timed("evaluation"):
            for group in self._rows.groups(occupant.row for occupant in due):
                learned, data = self._rows.take(group)
                found = self._programs.evaluate(learned, data, self._rows.is_there(group))
                losses |= self._rows.by_row(group, found)
        for occupant in due:
            occupant.evaluations.append((occupant.step, rounded(losses[occupant.row])))
            self._recorder.write_row(occupant, occupant.step, occupant.evaluations[-1][1])

    def _at_every(self, interval: int) -> list[Occupant]:
        """The concepts whose step is a multiple of ``interval``, or their last."""
        return [
            occupant
            for occupant in self._rows.occupied.values()
            if occupant.step % interval == 0 or occupant.step == occupant.updates
        ]

    # ------------------------------------------------------------------ what the host does

    def _read_pending(self, evaluated: Sequence[Occupant] = ()) -> None:
        """Wait for what was dispatched and write its losses.

        For the concepts in ``evaluated`` the line of the present step is left to the evaluation,
        which has more to write there.
        """
        while self._pending:
            self._recorder.read(self._pending.popleft(), evaluated)

    def _write_due(self, stop: threading.Event) -> None:
        """Write intermediate concept files and sample grids where the step asks for them; grids,
        which take long, only until ``stop``.
        """
        options = self._recording
        every = options.validation_steps if options.validation_prompt else None
        due = self._at_every(options.checkpointing_steps)
        saved = [occupant for occupant in due if occupant.step < occupant.updates]
        drawn = self._at_every(every) if every else []
        if not saved and not drawn:
            return
        self._read_pending()
        with self._recorder.timed("files and grids"):
            self.write_files(saved)
            for occupant, (learned, _) in zip(drawn, self._rows.exported(drawn), strict=True):
                if stop.is_set():
                    logger.info("asked to stop: the sample grids of this step are not drawn")
                    return
                folder = self._out.concept(occupant.name) / names.SAMPLES_FOLDER
                path = folder / f"{occupant.step:06d}.png"
                make_way(folder, for_folder=True)
                make_way(path)
                self._grids.write(path, occupant.concept, learned, occupant.step)

    def _save_checkpoint(self) -> None:
        """Save everything under way, also what has no row again yet."""
        with self._recorder.timed("checkpoints"):
            self._read_pending()  # what a checkpoint has seen is not done again
            self._recorder.flush()
            self._out.flush_index()
            rows = [*self._rows.saved_rows(), *self._saved.values()]
            self.checkpoints.save(self._clock, rows)
