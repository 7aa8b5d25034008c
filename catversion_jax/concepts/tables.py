"""CSV and JSON lines: a row is one thing, and a broken row breaks nothing but itself."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.config.documents import parse_json, read_text
from catversion_jax.errors import CatVersionError, shown

_EXTRA = "fields beyond the header"
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
      where: its file and place, for messages.
      number: its place, from 1.
      values: what it says; anything that JSON can hold.
      problem: why it cannot be read, or None.
    """

    where: str
    number: int
    values: Any
    problem: str | None = None


def read_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of a ``.csv`` or ``.jsonl`` file, and notes on the file.

    Raises:
      CatVersionError: the file cannot be read, or its header repeats a column.
    """
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        return _csv_rows(path, text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            rows.append(Row(where, number, parse_json(line, where)))
        except CatVersionError as error:
            rows.append(Row(where, number, {}, str(error)))
    return rows, ()


def _csv_rows(path: Path, text: str) -> tuple[list[Row], tuple[str, ...]]:
    header, _, rest = text.lstrip("\r\n").partition("\n")
    delimiter = max(_DELIMITERS, key=header.count)
    if header.strip()[:4].casefold() == "sep=":  # Excel's own line before the header
        delimiter, text = next((d for d in _DELIMITERS if header[4:5] == d), delimiter), rest
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        restkey=_EXTRA,
        skipinitialspace=delimiter != "\t",
        delimiter=delimiter,
    )
    rows: list[Row] = []
    try:
        columns = reader.fieldnames or ()
        if twice := sorted({name for name in columns if name and list(columns).count(name) > 1}):
            raise CatVersionError(
                f"{path}: the column {shown(twice[0])} appears twice in the header. Rename one."
            )
        for number, values in enumerate(reader, 1):
            where = f"{path} line {reader.line_num}"
            rows.append(Row(where, number, values, _row_problem(values, where, delimiter)))
    except csv.Error as error:
        raise CatVersionError(
            f"{path}: is not valid CSV: line {reader.line_num}: {shown(error)}"
        ) from None
    name = _DELIMITERS[delimiter]
    note = f"{path.name}: columns are separated by {name}s ({delimiter!r})"
    return rows, () if delimiter == "," else (note,)


def _row_problem(values: Mapping[Any, Any], where: str, delimiter: str) -> str | None:
    if _EXTRA not in values:
        return None
    return (
        f"{where}: more fields than the header has. Quote texts that contain a "
        f"{_DELIMITERS[delimiter]}."
    )
