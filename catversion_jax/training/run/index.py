"""``index.csv``: a row for each concept of a run, with its state."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.regular_files import make_way, read_csv_rows, read_text
from catversion_jax.runtime.spreadsheet_cells import harmless_cell, plain_cell
from catversion_jax.training.run import names

STATES = ("queued", "running", "done", "stopped early", "quarantined")
FINISHED = ("done", "stopped early")
COLUMNS = ("name", "state", "eval_loss", "plain_eval_loss", "file", "reason")
_TEXTS = ("name", "file", "reason")
REASON_LENGTH = 500
"""Characters of a reason that the index keeps; ``FAILED.txt`` has all of it."""


def one_line(reason: str) -> str:
    """The beginning of a reason, for a table."""
    lines = reason.strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= REASON_LENGTH else f"{lines[0][: REASON_LENGTH - 4]} ..."


def write_index(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write the rows; texts are cells that no spreadsheet runs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        texts = {key: harmless_cell(row[key]) for key in _TEXTS if key in row}
        writer.writerow({**row, **texts})
    make_way(path)
    write_atomically(path, text.getvalue().encode("utf-8", "backslashreplace"))


def read_index(path: Path) -> list[dict[str, str]]:
    """The rows that are whole: those with a name and a known state."""
    rows = read_csv_rows(path, COLUMNS)
    kept = [row for row in rows if row["name"] and row["state"] in STATES]
    return [{**row, **{key: plain_cell(row[key]) for key in _TEXTS}} for row in kept]


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
