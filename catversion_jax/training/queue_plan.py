"""Which concepts still need training, in which order, and where they continue."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from catversion_jax.errors import CatVersionError, ConceptError, listed
from catversion_jax.training.queue_records import QueueRecords
from catversion_jax.training.run import checkpoint
from catversion_jax.training.run.checkpoint import SavedRow
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.state import TrainState

logger = logging.getLogger(__name__)

LISTED = 20
"""Concepts that a refusal names; a changed model would name all of a thousand."""


@dataclasses.dataclass(frozen=True)
class QueuePlan:
    """What is to do.

    Attributes:
      names: concepts in the order in which they get a row: those under way first, those that failed
        earlier last.
      saved: states of those under way, from the newest intact checkpoints.
      clock: steps the run's program has made; numbers the checkpoints.
    """

    names: tuple[str, ...]
    saved: Mapping[str, SavedRow]
    clock: int


def plan_queue(
    records: QueueRecords,
    run: RunDirectory,
    template: TrainState,
    *,
    retrains: bool,
) -> QueuePlan:
    """Read what ``run`` holds of the concepts in ``records``.

    Args:
      records: every concept of the run, in order.
      run: what was done before.
      template: a state of any number of rows, for its structure.
      retrains: whether concepts that were changed since are trained again, from the start.

    Raises:
      CatVersionError: a concept that is finished or under way was changed since, and ``retrains``
        is off; all are listed.
    """
    remembered = run.recall(records.believed) if records.believed and not retrains else set()
    compared = {
        name: records[name].differences(concept)
        for name, concept in run.read_finals(records, but=remembered)
    }
    changed = {name: what for name, what in compared.items() if what}
    done = remembered | (set(compared) - set(changed))
    saved: dict[str, SavedRow] = {}
    clock = 0
    for folder in sorted(run.checkpoints.glob("process-[0-9]*")):
        newest, rows = checkpoint.restore_newest(folder, template)
        clock = max(clock, newest)
        for row in rows:
            name = row.record.name
            if name not in records or name in done or row.failed:
                continue
            if name not in saved or saved[name].step < row.step:
                saved[name] = row
    for name, row in [*saved.items()]:
        try:
            what = records[name].changes_since(row.record)
        except ConceptError:  # of a long list; it is given up in its turn
            del saved[name]
            continue
        if what:
            changed.setdefault(name, what)
            del saved[name]
    if changed and not retrains:
        raise _refused(run, changed)
    for name, what in changed.items():
        logger.info("training %s again: %s", name, "; ".join(what))
        run.reopen(name)
    if saved:
        steps = sorted({row.step for row in saved.values()})
        reached = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        logger.info("resumed %d concepts at %s", len(saved), reached)
    fresh = [name for name in records if name not in done and name not in saved]
    failed = run.failed_before()
    fresh.sort(key=failed.__contains__)
    for name in failed & done:
        run.clear_failure(name)
    return QueuePlan((*saved, *fresh), saved, clock)


def _refused(run: RunDirectory, changed: Mapping[str, Sequence[str]]) -> CatVersionError:
    lines = [f"{name}: {'; '.join(what)}" for name, what in changed.items()]
    return CatVersionError(
        f"output_dir={run.root}: these concepts were trained from something else than they are "
        "now. Give another output_dir, undo the change, or give retrain=changed, which trains "
        "exactly these again:\n  " + "\n  ".join(listed(lines, LISTED))
    )
