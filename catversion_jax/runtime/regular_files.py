"""Small files that a program keeps for itself, read whatever became of them.

A crash, a full disk, an editor or somebody's script may have left anything in their place: nothing,
half a file, other bytes, a folder, a pipe. Reading never raises for that and never waits; writing
first moves what is no file of ours out of the way.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catversion_jax.runtime.atomic_files import unwritable
from catversion_jax.runtime.bucket_paths import is_in_bucket

logger = logging.getLogger(__name__)

ASIDE = ".damaged"
"""What the name of a thing ends with that was moved out of the way."""


def read_text(path: Path) -> str | None:
    """The text of a regular file, what is no UTF-8 replaced; None where none can be read."""
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return None
        return path.read_bytes().decode("utf-8", "replace")
    except (OSError, ValueError):
        return None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; {} where there is none."""
    text = read_text(path)
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_csv_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, as far as they can be read.

    Args:
      path: the file.
      columns: what every row gets, "" where the file does not have it.
    """
    return csv_rows(read_text(path) or "", columns)


def csv_rows(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """:func:`read_csv_rows` of a text."""
    rows: list[dict[str, str]] = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            rows.append({column: row.get(column) or "" for column in columns})
    except csv.Error:
        pass  # what follows is damaged
    return rows


def make_way(path: Path, *, for_folder: bool = False) -> None:
    """Move what is no file (or no folder) out of the way of one; it is kept under another name.

    Raises:
      CatVersionError: it cannot be moved.
    """
    if is_in_bucket(path) or (not path.is_symlink() and not path.exists()):
        return
    if path.is_dir() if for_folder else path.is_file():
        return
    move_aside(path)


def move_aside(path: Path) -> None:
    """Give a thing that nothing can be made of another name, so that it stands in nobody's way.

    Raises:
      CatVersionError: it cannot be moved.
    """
    number, aside = 0, path.with_name(path.name + ASIDE)
    while aside.is_symlink() or aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{ASIDE}-{number}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # another process was first
    except OSError as error:
        raise unwritable(path, error) from error
    logger.warning("%s: nothing can be made of it; moved to %s", path, aside.name)
