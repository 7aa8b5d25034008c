"""``retrain=failed``: a larger budget for exactly the concepts that fail the quality gate.

    (1)  budget = retrain_factor x the updates after which the concept failed;
         UPDATES_AFTER_PREDICTION after none

The gate's file records those updates, so the same command with the same file asks for the same
budget, however often it is run. A concept trained so has ``failed_at`` in its file beside the
larger ``max_train_steps``: later starts of the run, with ``retrain=none``, know by it that it is
finished. Early stopping, which would end it where it had ended before, is not asked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container
from pathlib import Path

from catversion_jax.config import RecordingOptions
from catversion_jax.config.method import UPDATES_AFTER_PREDICTION
from catversion_jax.errors import CatVersionError, listed, shown
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.concept_packs import accent_form
from catversion_jax.runtime.regular_files import read_json_object
from catversion_jax.runtime.shards import WHOLE, Shard
from catversion_jax.training.run.names import EVALUATION_FOLDER, GATE_FILE
from catversion_jax.training.run.records import FAILED_AT

logger = logging.getLogger(__name__)


def larger_budgets(
    names: Container[str], max_train_steps: int, options: RecordingOptions, shard: Shard = WHOLE
) -> dict[str, dict[str, int]]:
    """What changes in the configs of concepts that failed, under ``retrain=failed``: equation (1),
    by name.

    Args:
      names: of every concept of the run.
      max_train_steps: the run's own updates.
      options: ``retrain``, and what belongs to it.
      shard: the part of the list that ``names`` are of.

    Raises:
      CatVersionError: the gate's file is missing or is none.
    """
    if options.retrain != "failed":
        return {}
    path = gate_path(options)
    found, said = dict[str, dict[str, int]](), list[str]()
    for name, known in failed_concepts(path).items():
        if not shard.holds(name):
            continue
        if (own := accent_form(name, names)) is None:
            logger.warning(f"{name}: fails the gate of {path}, but is none of this run's concepts")
            continue
        updates = max_train_steps if known is None else known
        budget = math.ceil(options.retrain_factor * updates) or UPDATES_AFTER_PREDICTION
        if budget >= 2**31:
            raise CatVersionError(
                f"retrain=failed: {path}: {name!r}: {options.retrain_factor} x {updates} updates "
                f"are more than {2**31 - 1}. Give a smaller retrain_factor, or run catversion "
                "evaluate RUN --gate again."
            )
        found[own] = {"max_train_steps": budget, FAILED_AT: updates}
        said.append(f"{name} {updates} -> {budget}")
    logger.info(
        f"retrain=failed: {len(said)} concepts get more updates: "
        f"{', '.join(listed(said, 10)) or 'none'}"
    )
    return found


def gate_path(options: RecordingOptions) -> Path:
    """The gate's file: ``gate_file``, else where ``catversion evaluate`` writes it."""
    if options.gate_file is not None:
        return as_path(options.gate_file)
    return as_path(options.output_dir) / EVALUATION_FOLDER / GATE_FILE


def failed_concepts(path: Path) -> dict[str, int | None]:
    """The concepts that fail and the updates after which they did; None where the file, of images
    that were drawn elsewhere, does not say: then the run's.

    Raises:
      CatVersionError: the file is missing or is no gate's.
    """
    failed = read_json_object(path).get("failed")
    if not isinstance(failed, dict):
        state = "is no file of the quality gate" if path.is_file() else "not found"
        raise CatVersionError(
            f"retrain=failed: {path}: {state}. catversion evaluate RUN --gate writes it; "
            "gate_file=FILE says where it is."
        )
    updates: dict[str, int | None] = {}
    for name, value in failed.items():
        if isinstance(value, dict) and "updates" not in value:
            updates[name] = None
            continue
        number = value["updates"] if isinstance(value, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
            raise CatVersionError(
                f"retrain=failed: {path}: {name!r}: updates={shown(number)}: must be a number of "
                "updates. Run catversion evaluate RUN --gate again."
            )
        updates[name] = number
    return updates
