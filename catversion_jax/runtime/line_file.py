"""A text file that grows by lines."""

from __future__ import annotations

import time
from pathlib import Path

from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.bucket_paths import is_in_bucket
from catversion_jax.runtime.regular_files import read_text

BUCKET_SECONDS = 30.0


class LineFile:
    """Lines at the end of a file.

    Objects in a bucket cannot grow: there the whole file is written again every
    ``BUCKET_SECONDS`` and when it is flushed.
    """

    def __init__(self, path: Path, text: str | None = None):
        """Begin a new file with ``text``; None continues the file that is there, if any."""
        self._path, self._in_bucket = path, is_in_bucket(path)
        self._text, self._written = "", time.monotonic()
        if text is not None:
            write_atomically(path, text.encode())
        else:
            text = read_text(path) or ""
            if text and not text.endswith("\n"):  # a killed process left half a line
                self.write("\n")
        if self._in_bucket:
            self._text = text

    def write(self, text: str) -> None:
        """Append ``text``, which ends with a line break."""
        if not self._in_bucket:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(text)
            return
        self._text += text
        if time.monotonic() - self._written > BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are still held back; call this after the last line."""
        if self._in_bucket:
            self._written = time.monotonic()
            write_atomically(self._path, self._text.encode())
