"""Packs: any number of concept files as rows of one Arrow file, ``concepts.arrow#NAME`` is one.

The file is what the ``datasets`` library writes (an Arrow stream), so that library opens it too
and puts it on a hub. It is mapped into memory, never read as a whole. Rows are sorted by the UTF-8
bytes of their names, so that a name is found by bisection.

This file is also part of exported pipelines, which have nothing else of this package.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import mmap
import os
import struct
import unicodedata
from collections.abc import Container, Iterator
from typing import Any, BinaryIO

SUFFIX = ".arrow"
NAME_COLUMN, FILE_COLUMN = "name", "file"
_MARK = f"{SUFFIX}#"
_LONGEST_HEAD = 2**20
"""Bytes of a message before its body; that of a record batch of five columns has some hundred."""


class PackError(ValueError):
    """A pack that cannot be read, or has no such concept. The message says the value, the rule and
    the remedy.
    """


def split_packed(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The file and the name in ``concepts.arrow#NAME``; None for every other path."""
    folder, slash, last = os.fspath(path).rpartition("/")
    stem, mark, name = last.partition(_MARK)
    return (f"{folder}{slash}{stem}{SUFFIX}", name) if mark and stem else None


def read_packed(path: str | os.PathLike[str]) -> bytes | None:
    """The concept file that ``concepts.arrow#NAME`` means; None where ``path`` is another path, or
    where something of that name is there.

    Raises:
      PackError: the pack cannot be read, or has no such concept; or ``path`` is a pack itself.
    """
    packed = split_packed(path)
    if os.fspath(path).endswith(SUFFIX) and os.path.isfile(path):
        raise PackError(
            f"{os.fspath(path)}: is a pack of concepts, or nothing that is known here. Give one of "
            f"them: {os.path.basename(path)}#NAME; `catversion inspect` lists them."
        )
    if packed is None or os.path.lexists(path):
        return None
    pack, name = ConceptPack(packed[0]), packed[1]
    return pack[accent_form(name, pack) or name]


def accent_form(name: str, known: Container[str]) -> str | None:
    """The one of ``known`` that is ``name``, if need be with its accents stored in the other way;
    None where none is. Both look alike, so that whoever typed it may have meant the other.
    """
    forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    return next((form for form in forms if form in known), None)


class ConceptPack:
    """The concepts of one pack, by name; nothing is read before it is asked for.

    Opening looks at the head of every record batch, a few thousand rows each. pyarrow's own reader
    of streams would have the system read ahead all of them.

    Args:
      path: a file of this machine that ``catversion pack`` has written.

    Raises:
      PackError: it cannot be read, or is no pack.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if "://" in self.path:
            raise PackError(
                f"{self.path}: must be a file of this machine, which is mapped into memory. Copy "
                "it first: gcloud storage cp."
            )
        if not os.path.isfile(self.path):
            raise PackError(f"{self.path}: no such file. Give the pack as concepts{_MARK}NAME.")
        try:
            import pyarrow
        except ImportError as error:
            raise PackError(f"{self.path}: needs a library: pip install datasets") from error
        self._ipc = pyarrow.ipc
        with self._damage():
            with open(self.path, "rb", buffering=0) as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                schema, *self._places = _messages(file, len(self._bytes))
            if hasattr(mmap, "MADV_RANDOM"):
                self._bytes.madvise(mmap.MADV_RANDOM)  # megabytes around each page, otherwise
            self._buffer = pyarrow.py_buffer(self._bytes)
            self._schema = self._ipc.read_schema(self._buffer.slice(*schema))
            types = {field.name: str(field.type) for field in self._schema}
            if types.get(NAME_COLUMN) != "string" or types.get(FILE_COLUMN) != "binary":
                raise ValueError(f"it must have columns {NAME_COLUMN} and {FILE_COLUMN}")
        self._batches: dict[int, tuple[Any, Any]] = {}

    def __len__(self) -> int:
        return sum(len(self._batch(i)[0]) for i in range(len(self._places)))

    def __iter__(self) -> Iterator[str]:
        for i in range(len(self._places)):
            for row in range(len(self._batch(i)[0])):
                yield self._name(i, row)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def _find(self, name: str) -> tuple[int, int] | None:
        """Batch and row of a name."""
        key = _key(name)
        batches = range(len(self._places))
        batch = bisect.bisect_right(batches, key, key=lambda i: _key(self._name(i, 0))) - 1
        if batch >= 0:
            rows = range(len(self._batch(batch)[0]))
            row = bisect.bisect_left(rows, key, key=lambda row: _key(self._name(batch, row)))
            if row < len(rows) and self._name(batch, row) == name:
                return batch, row
        return None

    def __getitem__(self, name: str) -> bytes:
        if (place := self._find(name)) is not None:
            batch, row = place
            last = row + 1 == len(self._batch(batch)[0])
            after = (batch + 1, 0) if last else (batch, row + 1)
            if after[0] < len(self._places) and self._name(*after) == name:
                raise self._damaged(f"two rows are called {name!r:.120}")
            file = bytes(self._cell(self._batch(batch)[1], row))
            if (own := _own_name(file)) not in (None, name):
                raise self._damaged(f"the row {name!r:.120} holds concept {own!r:.120}")
            return file
        near = [*itertools.islice(self, 3)]
        raise PackError(
            f"{self.path}: has no concept {name!r:.120}; there are {', '.join(near)} and so on. "
            f"Give one as {os.path.basename(self.path)}#NAME."
        )

    def _name(self, batch: int, row: int) -> str:
        return str(self._cell(self._batch(batch)[0], row))

    def _cell(self, column: Any, row: int) -> Any:
        value = column[row].as_py() if row < len(column) else None
        if value is None:
            raise self._damaged("an empty cell")
        return value

    def _batch(self, number: int) -> tuple[Any, Any]:
        """Names and files of one record batch, whose offsets lie within it."""
        if number not in self._batches:
            with self._damage():
                data = self._buffer.slice(*self._places[number])
                batch = self._ipc.read_record_batch(data, self._schema)
                columns = (batch.column(NAME_COLUMN), batch.column(FILE_COLUMN))
                for column in columns:
                    column.validate(full=True)
            self._batches[number] = columns
        return self._batches[number]

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Whatever is raised inside is the file's fault: pyarrow has a class for each kind."""
        try:
            yield
        except Exception as error:
            raise self._damaged(error) from error

    def _damaged(self, error: object) -> PackError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return PackError(
            f"{self.path}: is no pack of concepts, or damaged ({reason:.200}). Pack the run again: "
            f"catversion pack RUN --out {os.path.basename(self.path)}."
        )


def _own_name(file: bytes) -> str | None:
    """What a concept file calls itself; None where it says nothing that can be read."""
    try:
        (size,) = struct.unpack("<Q", file[:8])
        name = json.loads(file[8 : 8 + size])["__metadata__"]["catversion.name"]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        return None  # whoever reads the file says what is wrong
    return name if isinstance(name, str) else None


def _messages(file: BinaryIO, end: int) -> list[tuple[int, int]]:
    """Where the messages of an Arrow stream lie, as (first byte, length): the schema's, then one
    for each record batch (Arrow columnar format, "Encapsulated message format"; the length of a
    body is the field ``bodyLength`` of the flatbuffer ``Message``).

    Raises:
      ValueError: the stream does not end well.
      struct.error: it ends in the middle of a message.
    """
    places: list[tuple[int, int]] = []
    start = 0
    while True:
        file.seek(start)
        marker, size = struct.unpack("<Ii", file.read(8))
        if marker != 0xFFFFFFFF or not 0 <= size <= _LONGEST_HEAD:
            raise ValueError(f"no message at byte {start}")
        if size == 0:
            return places
        head = file.read(size)
        (table,) = struct.unpack_from("<I", head)
        fields = table - struct.unpack_from("<i", head, table)[0]
        has_body = struct.unpack_from("<H", head, fields)[0] > 10
        place = struct.unpack_from("<H", head, fields + 10)[0] if has_body else 0
        body = struct.unpack_from("<q", head, table + place)[0] if place else 0
        length = 8 + size + body
        if body < 0 or start + length > end:
            raise ValueError(f"the message at byte {start} has no end")
        places.append((start, length))
        start += length


def _key(name: str) -> bytes:
    """What rows are sorted by."""
    return name.encode("utf-8", "surrogatepass")
