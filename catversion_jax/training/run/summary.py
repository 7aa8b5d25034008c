"""``metrics.json``: the final losses of a concept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from catversion_jax.methods.concept_file import Concept
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.regular_files import make_way, read_json_object
from catversion_jax.training.run import names
from catversion_jax.training.run.metrics import read_evaluations

LOSSES = ("eval_loss", "plain_eval_loss")
STOPPED_EARLY = "stopped_early"


def read_summary(folder: Path) -> dict[str, float]:
    """The final losses in a concept's folder; empty where none are recorded."""
    found = read_json_object(folder / names.SUMMARY_FILE)
    numbers = {
        key: value
        for key in (*LOSSES, STOPPED_EARLY)
        if isinstance(value := found.get(key), int | float) and not isinstance(value, bool)
    }
    return {key: value for key, value in numbers.items() if abs(value) < math.inf}


def write_summary(folder: Path, summary: Mapping[str, float]) -> None:
    """Write the final losses, for people and for ``index.csv``."""
    path = folder / names.SUMMARY_FILE
    make_way(path)
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())


def restored_summary(folder: Path, concept: Concept) -> dict[str, float]:
    """The summary of a finished concept, written again from its files where it is lost.

    The plain model's loss stands nowhere else and stays unknown.
    """
    summary = read_summary(folder)
    if summary:
        return summary
    losses = dict(read_evaluations(folder / names.METRICS_FILE))
    if concept.step in losses:
        summary["eval_loss"] = losses[concept.step]
    wanted = concept.train_config.get("max_train_steps")
    if isinstance(wanted, int) and concept.step < wanted:
        summary[STOPPED_EARLY] = concept.step
    if summary:
        write_summary(folder, summary)
    return summary


def finished_state(summary: Mapping[str, float]) -> str:
    """``"done"`` or ``"stopped early"``, as the final losses of a finished concept say."""
    return "stopped early" if STOPPED_EARLY in summary else "done"
