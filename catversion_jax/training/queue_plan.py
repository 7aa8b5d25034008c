"""Which concepts still need training, in which order, and where they continue."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from catversion_jax.errors import CatVersionError
from catversion_jax.training.run import checkpoint
from catversion_jax.training.run.checkpoint import SavedRow
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.run.records import ConceptRecord
from catversion_jax.training.state import TrainState

logger = logging.getLogger(__name__)


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
    records: Mapping[str, ConceptRecord],
    run: RunDirectory,
    template: TrainState,
    max_train_steps: int,
) -> QueuePlan:
    """Read what ``run`` holds of the concepts in ``records``.

    Args:
      records: every concept of the run, in order.
      run: what was done before.
      template: a state of any number of rows, for its structure.
      max_train_steps: steps after which a concept is finished.

    Raises:
      CatVersionError: a concept that is finished or under way was changed since; all are listed.
    """
    finals = run.read_finals([*records], max_train_steps)
    changed = {name: records[name].differences(concept) for name, concept in finals}
    done = set(changed)
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
    changed |= {name: records[name].changes_since(row.record) for name, row in saved.items()}
    _refuse_changed(run, changed)
    if saved:
        steps = sorted({row.step for row in saved.values()})
        reached = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        logger.info("resumed %d concepts at %s", len(saved), reached)
    fresh = [name for name in records if name not in done and name not in saved]
    fresh.sort(key=run.has_failed)
    return QueuePlan((*saved, *fresh), saved, clock)


def _refuse_changed(run: RunDirectory, changed: Mapping[str, Sequence[str]]) -> None:
    lines = [f"  {name}: {'; '.join(what)}" for name, what in changed.items() if what]
    if lines:
        raise CatVersionError(
            f"output_dir={run.root}: these concepts were trained from something else than they are "
            "now. Give another output_dir, another name, or undo the change:\n" + "\n".join(lines)
        )
