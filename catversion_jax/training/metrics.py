"""What a run records: a CSV per concept, one JSONL for the run, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from catversion_jax.atomic_files import write_atomically

COLUMNS = ("step", "loss", "eval_loss")


class MetricsRecorder:
    """Losses of one pack's concepts; ``names`` are theirs, in row order.

    ``loss`` is the mean training loss since the last row: noisy, dominated by its random timesteps.
    ``eval_loss`` is the deterministic one, comparable over time; step 0 is the untrained residual.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        jsonl: Path,
        tensorboard_dir: Path | None,
        start_step: int,
    ):
        self._files = {name: folder / "metrics.csv" for name, folder in folders.items()}
        self._rows = {name: _read_rows(path, start_step) for name, path in self._files.items()}
        self.names = list(folders)
        self._pending: dict[str, list[float]] = {name: [] for name in folders}
        self._jsonl = jsonl
        self._writers: dict[str, object] = {}
        self._tensorboard_dir = tensorboard_dir
        self._start_step = start_step
        if jsonl.exists() and not jsonl.read_bytes().endswith(b"\n"):
            with jsonl.open("a", encoding="utf-8") as file:
                file.write("\n")  # a killed process left half a line

    def add_losses(self, losses: Mapping[str, Sequence[float]]) -> None:
        """Training losses of the newest steps, per concept, oldest first."""
        for name, values in losses.items():
            self._pending[name].extend(values)

    def write_row(
        self, step: int, eval_loss: Mapping[str, float] | None, throughput: Mapping[str, float]
    ) -> None:
        """Close the current window at ``step`` and write it everywhere."""
        record: dict[str, dict[str, float | None]] = {}
        for name, rows in self._rows.items():
            window = [v for v in self._pending[name] if math.isfinite(v)]
            self._pending[name].clear()
            loss = sum(window) / len(window) if window else None
            evaluated = eval_loss.get(name) if eval_loss else None
            if evaluated is not None and not math.isfinite(evaluated):
                evaluated = None  # of a failed concept; JSON has no word for it
            rows.append((step, loss, evaluated))
            record[name] = {"loss": loss, "eval_loss": evaluated}
            write_atomically(self._files[name], _csv_bytes(rows))
            self._write_tensorboard(name, step, loss, evaluated)
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **throughput, "concepts": record}) + "\n")

    def close(self) -> None:
        """Flush TensorBoard."""
        for writer in self._writers.values():
            writer.close()  # type: ignore[attr-defined]

    def _write_tensorboard(
        self, name: str, step: int, loss: float | None, eval_loss: float | None
    ) -> None:
        if self._tensorboard_dir is None:
            return
        if name not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[name] = SummaryWriter(
                str(self._tensorboard_dir / name),
                flush_secs=30,
                # What a killed process wrote beyond its checkpoint is shown once only.
                purge_step=self._start_step + 1 if self._start_step else None,
            )
        for tag, value in (("loss/train", loss), ("loss/eval", eval_loss)):
            if value is not None:
                self._writers[name].add_scalar(tag, value, step)  # type: ignore[attr-defined]


def _read_rows(path: Path, last_step: int | None) -> list[tuple[int, float | None, float | None]]:
    """Rows up to ``last_step``: a resumed run writes the later ones anew."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            (int(r["step"]), _number(r["loss"]), _number(r["eval_loss"]))
            for r in csv.DictReader(file)
        ]
    return [row for row in rows if last_step is None or (row[0] <= last_step and last_step > 0)]


def _number(text: str) -> float | None:
    return float(text) if text else None


def _csv_bytes(rows: Sequence[tuple[int, float | None, float | None]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(
        [[step, *("" if v is None else f"{v:.6g}" for v in values)] for step, *values in rows]
    )
    return text.getvalue().encode()
