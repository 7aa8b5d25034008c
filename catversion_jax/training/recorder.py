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

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax.config import TrainConfig
from catversion_jax.runtime.line_file import LineFile
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.run.metrics import ConceptMetrics, RunMetrics
from catversion_jax.training.slots import Slot
from catversion_jax.training.step import StepMetrics

logger = logging.getLogger(__name__)

TIMELINE_COLUMNS = ("slot", "concept", "began", "ended", "first_step", "last_step", "outcome")


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """Results of one dispatch, still on their way from the device.

    Attributes:
      clock: of the run, after it.
      num_steps: how many it made.
      slots: the concepts it trained, with their steps before it.
      metrics: what it reports.
    """

    clock: int
    num_steps: int
    slots: Sequence[tuple[Slot, int]]
    metrics: StepMetrics


class Recorder:
    """Everything that is written about a run but its results; leaving the block sums up."""

    def __init__(self, out: RunDirectory, config: TrainConfig, bar: tqdm):
        self._out, self._config, self._bar = out, config, bar
        self._metrics: dict[str, ConceptMetrics] = {}
        self._lines = RunMetrics(out.jsonl)
        self._started = time.perf_counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        begun = out.timeline.exists()
        self._timeline = LineFile(out.timeline, None if begun else _line(TIMELINE_COLUMNS))
        # ``mark`` is when the last dispatch was read, None after other work.
        self._mark: float | None = None
        self._rate = 0.0
        self._open: dict[int, Slot] = {}

    # ------------------------------------------------------------------ time

    @property
    def now(self) -> float:
        """Seconds into the run."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the block as other work than training."""
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
        for slot in list(self._open.values()):
            self.end(slot, "interrupted")
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

    def begin(self, slot: Slot) -> None:
        """A concept has got a row."""
        logs = self._out.logs / slot.name if self._config.report_to == "tensorboard" else None
        path = self._out.concept(slot.name) / "metrics.csv"
        self._metrics[slot.name] = ConceptMetrics(path, logs, slot.step)
        self._open[slot.row] = slot
        self._bar.update(slot.step)
        if slot.step == 0:
            self.write_row(slot, 0, slot.evaluations[-1][1])

    def end(self, slot: Slot, outcome: str) -> None:
        """A concept has left its row."""
        self._metrics.pop(slot.name).close()
        del self._open[slot.row]
        if outcome != "interrupted":
            self._bar.update(self._config.max_train_steps - slot.step)
        times = (f"{slot.began:.3f}", f"{self.now:.3f}")
        columns = (slot.row, slot.name, *times, slot.first_step, slot.step, outcome)
        self._timeline.write(_line(columns))

    def skip(self) -> None:
        """A concept that never gets a row."""
        self._bar.update(self._config.max_train_steps)

    # ------------------------------------------------------------------ losses

    def read(self, done: Dispatched, evaluated: Sequence[Slot]) -> None:
        """Losses of one dispatch, waiting for it. Rows of ``evaluated`` at their present step are
        left open: :meth:`write_row` closes them with their evaluation.
        """
        losses, failed_steps = jax.tree.map(
            np.asarray, (done.metrics.losses, done.metrics.failed_step)
        )
        for slot, before in done.slots:
            metrics = self._metrics[slot.name]
            failed = int(failed_steps[slot.row])
            if failed >= 0 and slot.failed_step < 0:
                slot.failed_step = failed
                logger.warning(f"{slot.name}: not finite at step {failed}; the others go on")
            for step, loss in enumerate(losses[: done.num_steps, slot.row].tolist(), before + 1):
                metrics.add_losses([loss])
                is_open = slot in evaluated and step == slot.step
                if step % self._config.logging_steps == 0 and not is_open:
                    self.write_row(slot, step, None)
        self._bar.set_description("training", refresh=False)
        self._bar.update(done.num_steps * len(done.slots))
        self._measure(done)

    def write_row(self, slot: Slot, step: int, eval_loss: float | None) -> None:
        """Close a concept's window of training losses at ``step``."""
        values = self._metrics[slot.name].write_row(step, eval_loss)
        self._lines.write({"concept": slot.name, "step": step, **values})

    def _measure(self, done: Dispatched) -> None:
        """Speed of the compiled step since the last read."""
        now, num_concept_steps = time.perf_counter(), done.num_steps * len(done.slots)
        if self._mark is not None:
            latest = num_concept_steps / (now - self._mark)
            self._rate = latest if self._rate == 0 else 0.7 * self._rate + 0.3 * latest
        self._mark = now
        per_hour = 3600 * self._rate / self._config.max_train_steps
        if self._rate:
            latest_losses = [s.evaluations[-1][1] for s, _ in done.slots if s.evaluations]
            mean = f"eval loss {np.mean(latest_losses):.4f}, " if latest_losses else ""
            self._bar.set_postfix_str(f"{mean}{per_hour:.0f} concepts/h")
        if done.clock % self._config.logging_steps == 0:
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
