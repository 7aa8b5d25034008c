"""Who asks: API keys from a file of the operator's.

A line is ``NAME KEY``; empty lines and those that begin with ``#`` are left out. Only digests of
keys are kept, and all of them are compared in constant time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from catversion_jax.errors import CatVersionError, shown
from catversion_jax.runtime.regular_files import read_text

LOCAL = "local"
"""The one user of a server without keys."""
SHORTEST_KEY = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys:
    """The keys of a server.

    Args:
      digests: SHA-256 of each key, by the name of its user; None where everybody may come in.
    """

    def __init__(self, digests: Mapping[str, bytes] | None):
        self._digests = digests

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """Read the file of keys; None lets everybody in as one user.

        Raises:
          CatVersionError: the file cannot be read, holds no key, or a line that is no name and key.
        """
        if path is None:
            return cls(None)
        text = read_text(path)
        if text is None:
            raise CatVersionError(f"keys={path}: is no readable text file. Give one.")
        digests: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"keys={path}, line {number}"
            if len(words) != 2 or not _NAME.fullmatch(words[0]):
                raise CatVersionError(
                    f"{where}: must be a name of letters, digits and ._- and a key, with a space "
                    "between. Correct the line."
                )
            if len(words[1]) < SHORTEST_KEY:
                raise CatVersionError(
                    f"{where}: the key of {words[0]!r} has {len(words[1])} characters, fewer than "
                    f"{SHORTEST_KEY}. `openssl rand -hex 24` makes a good one."
                )
            if words[0] in digests:
                raise CatVersionError(f"{where}: {shown(words[0])} is there twice. Rename one.")
            digests[words[0]] = _digest(words[1])
        if not digests:
            raise CatVersionError(f"keys={path}: has no key. Write a line with name and key.")
        return cls(digests)

    def owner(self, authorization: str | None) -> str | None:
        """The user of an ``Authorization: Bearer KEY`` header, or ``Basic`` as browsers send it
        (whatever the name); None for a wrong one.
        """
        if self._digests is None:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode().partition(":")[2]
            except ValueError:
                return None
        elif scheme.lower() != "bearer":
            return None
        given, found = _digest(key), None
        for name, digest in self._digests.items():  # all, so that the time says nothing
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
