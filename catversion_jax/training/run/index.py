"""``index.csv``: a row for each concept of a run, with its state.

A row that changes is appended to ``index-changes.csv``, a line each; ``index.csv`` as a whole is
written once in a while, after which the changes begin anew. So what is written is proportional to
what happened, and :func:`read_index` always knows the newest state, whenever the process was
killed: changes that ``index.csv`` holds already say the same once more.
"""

from __future__ import annotations

import collections
import csv
import io
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.line_file import LineFile
from catversion_jax.runtime.regular_files import csv_rows, make_way, read_csv_rows, read_text
from catversion_jax.runtime.spreadsheet_cells import harmless_cell, plain_cell
from catversion_jax.training.run import names

STATES = ("queued", "running", "done", "stopped early", "quarantined")
FINISHED = ("done", "stopped early")
COLUMNS = ("name", "state", "eval_loss", "plain_eval_loss", "file", "reason")
_TEXTS = ("name", "file", "reason")
_HEADER = ",".join(COLUMNS) + "\n"
REASON_LENGTH = 500
"""Characters of a reason that the index keeps; ``FAILED.txt`` has all of it."""


def one_line(reason: str) -> str:
    """The beginning of a reason, for a table."""
    lines = reason.strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= REASON_LENGTH else f"{lines[0][: REASON_LENGTH - 4]} ..."


def index_row(
    name: str, state: str, summary: Mapping[str, float] | None = None, reason: str = ""
) -> dict[str, str]:
    """A concept's row of the index; ``summary`` holds its final losses."""
    row = {"name": name, "state": state, "reason": one_line(reason)}
    if state in FINISHED:
        row["file"] = f"{names.CONCEPTS_FOLDER}/{name}/{CONCEPT_FILE_NAME}"
    for key in ("eval_loss", "plain_eval_loss"):
        if summary and key in summary:
            row[key] = f"{summary[key]:.6g}"
    return row


class Index:
    """The rows of one process, in memory as the lines of the file.

    Args:
      path: ``index.csv``, or ``index-0001.csv`` and so on of the other processes.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines: dict[str, str] = {}
        self._states: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._changes: LineFile | None = None

    def change(self, row: Mapping[str, str]) -> None:
        """Note the state of a concept, in the file too."""
        self.set(row)
        if self._changes is not None:
            self._changes.write(self._lines[row["name"]])

    def flush(self) -> None:
        """Write the changes that a bucket has not yet."""
        if self._changes is not None:
            self._changes.flush()

    def set(self, row: Mapping[str, str]) -> None:
        """Note the state of a concept; the next :meth:`write` will write it."""
        name = row["name"]
        self._states[name] = row["state"]
        self._reasons.pop(name, None)
        if row.get("reason"):
            self._reasons[name] = row["reason"]
        self._lines[name] = _line(row)

    def write(self, but: Collection[str] = ()) -> None:
        """Write all rows as a whole, except those of the concepts in ``but``."""
        lines = [line for name, line in self._lines.items() if name not in but]
        make_way(self._path)
        write_atomically(self._path, (_HEADER + "".join(lines)).encode())
        make_way(changes_file(self._path))
        self._changes = LineFile(changes_file(self._path), _HEADER)

    def state(self, name: str) -> str:
        """Of one concept; empty where nothing was noted."""
        return self._states.get(name, "")

    def drop(self, name: str) -> None:
        """Leave a concept out of the next :meth:`write`."""
        for known in (self._lines, self._states, self._reasons):
            known.pop(name, None)

    def of_state(self, *states: str) -> list[str]:
        """Names of the concepts in one of several states, in the order of the list."""
        return [name for name, state in self._states.items() if state in states]

    def reason(self, name: str) -> str:
        """Why a concept was given up; empty where it was not."""
        return self._reasons.get(name, "")

    @property
    def counts(self) -> dict[str, int]:
        """The number of concepts in each state."""
        counts = collections.Counter(self._states.values())
        return {state: counts[state] for state in STATES}


def changes_file(path: Path) -> Path:
    """Where the changes lie since the index ``path`` was written: of ``index-0001.csv`` in
    ``index-changes-0001.csv``.
    """
    stem, dash, number = path.stem.partition("-")
    return path.with_name(f"{stem}-changes{dash}{number}{path.suffix}")


def indices_of_others(path: Path) -> list[Path]:
    """The indices of the other processes of the run whose ``index.csv`` is at ``path``."""
    return sorted(path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"))


def read_index(path: Path) -> list[dict[str, str]]:
    """The rows that are whole, those with a name and a known state, as they are now."""
    rows = {row["name"]: row for row in _sound(read_csv_rows(path, COLUMNS))}
    whole_lines = (read_text(changes_file(path)) or "").rpartition("\n")[0]
    changed = _sound(csv_rows(whole_lines, COLUMNS))
    rows |= {row["name"]: row for row in changed if row["name"] in rows}
    return list(rows.values())


def _sound(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    kept = [row for row in rows if row["name"] and row["state"] in STATES]
    return [{**row, **{key: plain_cell(row[key]) for key in _TEXTS}} for row in kept]


def _line(row: Mapping[str, str]) -> str:
    cells = [
        harmless_cell(row.get(key, "")) if key in _TEXTS else row.get(key, "") for key in COLUMNS
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def index_of_folders(root: Path) -> list[dict[str, str]]:
    """What the folders of the concepts say, for a run whose index is lost."""
    rows = []
    for folder in sorted((root / names.CONCEPTS_FOLDER).glob("*/")):
        failed = read_text(folder / names.FAILED_FILE)
        state = "queued"
        if failed is not None:
            state = "quarantined"
        elif (folder / CONCEPT_FILE_NAME).is_file():
            state = "done"
        elif (folder / names.METRICS_FILE).is_file():
            state = "running"
        row = dict.fromkeys(COLUMNS, "")
        rows.append({**row, "name": folder.name, "state": state, "reason": one_line(failed or "")})
    return rows
