"""Names that are one to a file system or to whoever reads them."""

from __future__ import annotations

import unicodedata


def folded(name: str) -> str:
    """What one name has in common on every file system: macOS stores accents apart, and Windows
    does not tell ``DOG.JPG`` from ``dog.jpg``.
    """
    return unicodedata.normalize("NFC", name).casefold()
