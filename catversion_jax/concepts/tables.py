"""CSV and JSON lines: a row is one thing, and a broken row breaks nothing but itself.

A table may be long: what is kept of a row is its text, and what it says is found out when it is
asked for.
"""

from __future__ import annotations

import array
import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.config.documents import parse_json, read_text
from catversion_jax.errors import CatVersionError, shown

MAX_BYTES = 256 * 2**20
"""Of a list; a million concepts have about 100 MB."""
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


class Table(Sequence[Row]):
    """The rows of a ``.csv`` or ``.jsonl`` file.

    Attributes:
      notes: on the file as a whole.

    Raises:
      CatVersionError: the file cannot be read, or its header repeats a column.
    """

    def __init__(self, path: Path):
        text = read_text(path, max_bytes=MAX_BYTES)
        self.notes: tuple[str, ...] = ()
        self._path = path
        self._columns: Sequence[str] | None = None  # of CSV
        self._rows: list[list[str]] | list[str] = []
        self._lines = array.array("L")
        if path.suffix.lower() == ".csv":
            self._read_csv(text)
        else:
            numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            self._rows = [line for _, line in numbered]
            self._lines.extend(number for number, _ in numbered)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        where, row = f"{self._path} line {self._lines[place]}", self._rows[place]
        if isinstance(row, list):
            assert self._columns is not None
            return self._csv_row(place, where, row, self._columns)
        try:
            return Row(where, self._lines[place], parse_json(row, where))
        except CatVersionError as error:
            return Row(where, self._lines[place], {}, str(error))

    def _csv_row(self, place: int, where: str, row: list[str], columns: Sequence[str]) -> Row:
        """A row as ``csv.DictReader`` has it."""
        values: dict[str, Any] = dict.fromkeys(columns) | dict(zip(columns, row, strict=False))
        problem = None
        if extra := row[len(columns) :]:
            values[_EXTRA] = extra
            problem = (
                f"{where}: more fields than the header has. Quote texts that contain a "
                f"{_DELIMITERS[self._delimiter]}."
            )
        return Row(where, place + 1, values, problem)

    def _read_csv(self, text: str) -> None:
        header, _, rest = text.lstrip("\r\n").partition("\n")
        delimiter = max(_DELIMITERS, key=header.count)
        if header.strip()[:4].casefold() == "sep=":  # Excel's own line before the header
            delimiter, text = next((d for d in _DELIMITERS if header[4:5] == d), delimiter), rest
        reader = csv.reader(
            io.StringIO(text, newline=""), skipinitialspace=delimiter != "\t", delimiter=delimiter
        )
        rows: list[list[str]] = []
        try:
            columns = next((row for row in reader if row), [])
            if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
                raise CatVersionError(
                    f"{self._path}: the column {shown(twice[0])} appears twice in the header. "
                    "Rename one."
                )
            for row in reader:
                if row:
                    rows.append(row)
                    self._lines.append(reader.line_num)
        except csv.Error as error:
            raise CatVersionError(
                f"{self._path}: is not valid CSV: line {reader.line_num}: {shown(error)}"
            ) from None
        self._columns, self._rows, self._delimiter = columns, rows, delimiter
        if delimiter != ",":
            name = _DELIMITERS[delimiter]
            note = f"{self._path.name}: columns are separated by {name}s ({delimiter!r})"
            self.notes = (note,)


def read_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of a ``.csv`` or ``.jsonl`` file, and notes on the file.

    Raises:
      CatVersionError: the file cannot be read, or its header repeats a column.
    """
    table = Table(path)
    return list(table), table.notes
