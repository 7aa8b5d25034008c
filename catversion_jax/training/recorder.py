"""What the host writes while the device works: rows of losses, the progress bar, the timeline."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import io
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax.config import RecordingOptions
from catversion_jax.methods.learned import Learned
from catversion_jax.runtime.line_file import LineFile
from catversion_jax.runtime.regular_files import make_way, read_text
from catversion_jax.runtime.spreadsheet_cells import harmless_cell
from catversion_jax.training.rows import Occupant
from catversion_jax.training.run import names
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.run.metrics import ConceptMetrics, RunMetrics
from catversion_jax.training.run.summary import write_summary
from catversion_jax.training.step import StepMetrics

logger = logging.getLogger(__name__)

WRITERS = 8
"""Threads that write the files of concepts that end together."""
TIMELINE_COLUMNS = ("row", "concept", "began", "ended", "first_step", "last_step", "outcome")


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """Results of one dispatch, still on their way from the device.

    Attributes:
      clock: steps that the run's program has made, those of this dispatch included.
      num_steps: number of steps of this dispatch.
      trained: the concepts it trained, each with its step before it.
      metrics: what it reports.
    """

    clock: int
    num_steps: int
    trained: Sequence[tuple[Occupant, int]]
    metrics: StepMetrics


class Recorder:
    """Writes losses, progress and the timeline of a run; leaving the block sums up the time."""

    def __init__(
        self, out: RunDirectory, options: RecordingOptions, max_train_steps: int, bar: tqdm
    ):
        self._out, self._options, self._bar = out, options, bar
        self._max_steps = max_train_steps
        self._metrics: dict[str, ConceptMetrics] = {}
        self._lines = RunMetrics(out.jsonl)
        self._started = time.perf_counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        header = _line(TIMELINE_COLUMNS)
        make_way(out.timeline)
        begun = (read_text(out.timeline) or "").startswith(header)
        self._timeline = LineFile(out.timeline, None if begun else header)
        # When the last dispatch was read; None when the device has done other work since.
        self._mark: float | None = None
        self._rate = 0.0
        self._open: dict[int, Occupant] = {}

    # ------------------------------------------------------------------ time

    @property
    def now(self) -> float:
        """Seconds into the run."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time of the block as other work than training."""
        started = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - started)

    def add(self, what: str, seconds: float) -> None:
        """Count seconds of other work than training."""
        self._seconds[what] += seconds
        self._mark = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._sum_up()
        except OSError:
            if kind is None:  # else it would only hide the error under way
                raise

    def _sum_up(self) -> None:
        for occupant in list(self._open.values()):
            self.end(occupant, "interrupted")
        total = self.now
        training = total - sum(self._seconds.values())
        seconds = {"training": training, **self._seconds}
        self._lines.write({"seconds": {what: round(value, 2) for what, value in seconds.items()}})
        self.flush()
        shares = ", ".join(f"{what} {100 * s / total:.1f} %" for what, s in seconds.items())
        logger.info("%.0f s: %s", total, shares)

    def flush(self) -> None:
        """Make sure that all that was written is in the files."""
        self._lines.flush()
        self._timeline.flush()
        for metrics in self._metrics.values():
            metrics.flush()

    # ------------------------------------------------------------------ concepts

    def begin(self, occupant: Occupant) -> None:
        """Open the files of a concept that has got a row."""
        logs = self._out.logs / occupant.name if self._options.report_to == "tensorboard" else None
        path = self._out.concept(occupant.name) / names.METRICS_FILE
        self._metrics[occupant.name] = ConceptMetrics(
            path, logs, occupant.step, occupant.evaluations
        )
        self._open[occupant.row] = occupant
        self._bar.update(occupant.step)
        if occupant.step == 0:
            self.write_row(occupant, 0, occupant.evaluations[-1][1])

    def end(self, occupant: Occupant, outcome: str) -> None:
        """Close the files of a concept that has left its row."""
        self._metrics.pop(occupant.name).close()
        del self._open[occupant.row]
        if outcome != "interrupted":
            self._bar.update(occupant.updates - occupant.step)
        times = (f"{occupant.began:.3f}", f"{self.now:.3f}")
        name = harmless_cell(occupant.name)
        columns = (occupant.row, name, *times, occupant.first_step, occupant.step, outcome)
        self._timeline.write(_line(columns))

    def skip(self) -> None:
        """Count a concept that never gets a row as done."""
        self._bar.update(self._max_steps)

    # ------------------------------------------------------------------ losses

    def read(self, done: Dispatched, evaluated: Sequence[Occupant]) -> None:
        """Write the losses of one dispatch, waiting for it.

        For the concepts in ``evaluated`` the line of the present step is left open:
        :meth:`write_row` closes it together with the evaluation loss.
        """
        losses, failed_steps = jax.tree.map(
            np.asarray, (done.metrics.losses, done.metrics.failed_step)
        )
        for occupant, before in done.trained:
            metrics = self._metrics[occupant.name]
            failed = int(failed_steps[occupant.row])
            if failed >= 0 and occupant.failed_step < 0:
                occupant.failed_step = failed
                logger.warning(f"{occupant.name}: not finite at step {failed}; the others go on")
            for step, loss in enumerate(
                losses[: done.num_steps, occupant.row].tolist(), before + 1
            ):
                metrics.add_losses([loss])
                is_open = occupant in evaluated and step == occupant.step
                if step % self._options.logging_steps == 0 and not is_open:
                    self.write_row(occupant, step, None)
        self._bar.set_description("training", refresh=False)
        self._bar.update(done.num_steps * len(done.trained))
        self._measure(done)

    def write_row(self, occupant: Occupant, step: int, eval_loss: float | None) -> None:
        """Close a concept's window of training losses at ``step``."""
        values = self._metrics[occupant.name].write_row(step, eval_loss)
        self._lines.write({"concept": occupant.name, "step": step, **values})

    def _measure(self, done: Dispatched) -> None:
        """Speed of the compiled step since the last read."""
        now, num_concept_steps = time.perf_counter(), done.num_steps * len(done.trained)
        if self._mark is not None:
            latest = num_concept_steps / (now - self._mark)
            self._rate = latest if self._rate == 0 else 0.7 * self._rate + 0.3 * latest
        self._mark = now
        budget = max(1.0, float(np.mean([occupant.updates for occupant, _ in done.trained])))
        per_hour = 3600 * self._rate / budget
        if self._rate:
            latest_losses = [o.evaluations[-1][1] for o, _ in done.trained if o.evaluations]
            mean = f"eval loss {np.mean(latest_losses):.4f}, " if latest_losses else ""
            self._bar.set_postfix_str(f"{mean}{per_hour:.0f} concepts/h")
        if done.clock % self._options.logging_steps == 0:
            self._lines.write(
                {
                    "clock": done.clock,
                    "concept_steps_per_s": round(self._rate, 3),
                    "concepts_per_hour": round(per_hour, 1),
                }
            )


def _line(columns: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(columns)
    return text.getvalue()


def write_ends(
    out: RunDirectory, ended: Sequence[Occupant], states: Sequence[tuple[Learned, int]]
) -> list[dict[str, float]]:
    """Write the files of concepts that leave their rows, several at once: each waits for the disk.

    Args:
      out: the folder of the run.
      ended: the concepts.
      states: what each has learned, and its step that was not finite (-1: none).

    Returns:
      The summary of each; empty where a step was not finite.
    """

    def write(occupant: Occupant, state: tuple[Learned, int]) -> dict[str, float]:
        learned, failed = state
        name, record = occupant.name, occupant.concept.record
        if failed >= 0:
            record.save(out.concept_file(name, failed), learned, failed)
            return {}
        summary: dict[str, float] = final_losses(occupant)
        if occupant.step < occupant.updates:
            summary["stopped_early"] = occupant.step
        write_summary(out.concept(name), summary)
        record.save(out.concept_file(name), learned, occupant.step)
        return summary

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(write, ended, states))


def final_losses(occupant: Occupant) -> dict[str, float]:
    """What is kept of a concept's losses; warns where it learned nothing."""
    learned = occupant.evaluations[-1][1]
    if learned >= occupant.plain_loss:
        logger.warning(
            f"{occupant.name}: its evaluation loss {learned} is not below the plain model's "
            f"{occupant.plain_loss}, so it learned nothing useful. Train longer, try another "
            "learning_rate or init, and check that the base class suits the images."
        )
    return {"eval_loss": learned, "plain_eval_loss": occupant.plain_loss}


def rounded(loss: float) -> float:
    """As files show it: what a resumed run reads is what an uninterrupted one goes by."""
    return float(f"{loss:.6g}")
