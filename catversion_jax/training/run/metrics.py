"""What a run records: a CSV per concept, one JSONL for the run, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.runtime.line_file import LineFile
from catversion_jax.runtime.regular_files import make_way, read_csv_rows

COLUMNS = ("step", "loss", "eval_loss")


class ConceptMetrics:
    """Losses of one concept.

    ``loss`` is the mean training loss since the last row: noisy, dominated by its random timesteps.
    ``eval_loss`` is the deterministic one, comparable over time; step 0 is before any update.

    Args:
      path: ``metrics.csv``; rows beyond ``start_step`` and damaged ones go away.
      tensorboard_dir: receives the same numbers; None writes none.
      start_step: where the concept goes on.
      evaluations: (step, evaluation loss) so far, for rows that the file has lost.
    """

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None,
        start_step: int,
        evaluations: Sequence[tuple[int, float]] = (),
    ):
        self._tensorboard_dir = tensorboard_dir
        self._start_step, self._pending = start_step, list[float]()
        self._writer: Any = None
        rows = _rows_up_to(path, start_step, evaluations)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        make_way(path)
        self._file = LineFile(path, text.getvalue())

    def add_losses(self, losses: Sequence[float]) -> None:
        """Training losses of the newest steps, oldest first."""
        self._pending.extend(losses)

    def write_row(self, step: int, eval_loss: float | None) -> dict[str, float | None]:
        """Close the current window at ``step``; returns what was written."""
        window = [v for v in self._pending if math.isfinite(v)]
        self._pending.clear()
        values = {
            "loss": sum(window) / len(window) if window else None,
            # of a failed concept; JSON has no word for it
            "eval_loss": eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        }
        texts = ["" if v is None else f"{v:.6g}" for v in values.values()]
        self._file.write(",".join([str(step), *texts]) + "\n")
        self._write_tensorboard(step, {"train": values["loss"], "eval": values["eval_loss"]})
        return values

    def close(self) -> None:
        """Nothing more will come."""
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def flush(self) -> None:
        """Make sure that every row is in the file."""
        self._file.flush()

    def _write_tensorboard(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._tensorboard_dir is None:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter

            for folder in (self._tensorboard_dir.parent, self._tensorboard_dir):
                make_way(folder, for_folder=True)
            self._writer = SummaryWriter(
                str(self._tensorboard_dir),
                flush_secs=30,
                # What a killed process wrote beyond its checkpoint is shown once only.
                purge_step=self._start_step + 1 if self._start_step else None,
            )
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"loss/{tag}", value, step)


class RunMetrics:
    """The lines of the whole run."""

    def __init__(self, jsonl: Path):
        make_way(jsonl)
        self._file = LineFile(jsonl)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Make sure that every line is in the file."""
        self._file.flush()


def read_metric_rows(path: Path) -> list[tuple[int, str, str]]:
    """The rows of a concept's ``metrics.csv`` that can be read: step, loss, evaluation loss."""
    rows = read_csv_rows(path, COLUMNS)
    return [
        (int(row["step"]), row["loss"], row["eval_loss"])
        for row in rows
        if _is_step(row["step"]) and all(_is_loss(row[key]) for key in ("loss", "eval_loss"))
    ]


def read_evaluations(path: Path) -> tuple[tuple[int, float], ...]:
    """(step, evaluation loss) in a concept's ``metrics.csv``, in its order."""
    return tuple((step, float(loss)) for step, _, loss in read_metric_rows(path) if loss)


def _is_step(text: str) -> bool:
    return re.fullmatch("[0-9]{1,15}", text) is not None


def _is_loss(text: str) -> bool:
    try:
        return text == "" or math.isfinite(float(text))
    except ValueError:
        return False


def _rows_up_to(
    path: Path, last_step: int, evaluations: Sequence[tuple[int, float]]
) -> list[tuple[int, str, str]]:
    """Rows up to ``last_step``: a resumed run writes the later ones anew. Evaluations that the file
    has lost come from the checkpoint.
    """
    if last_step == 0:
        return []
    rows = {row[0]: row for row in read_metric_rows(path) if row[0] <= last_step}
    for step, loss in evaluations:
        known = rows.get(step, (step, "", ""))
        if step <= last_step and not known[2]:
            rows[step] = (step, known[1], f"{loss:.6g}" if math.isfinite(loss) else "")
    return [rows[step] for step in sorted(rows)]
