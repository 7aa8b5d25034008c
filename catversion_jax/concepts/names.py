"""Names of concepts, which are names of folders on every file system."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from catversion_jax.concepts.entries import Entry

_MAX_NAME_BYTES = 100
_UNSAFE_CHARACTERS = frozenset('<>:"|?*')
_DEVICE_NAMES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10)}
)


def check_concept_name(
    name: str, remedy: str = "Rename it, or set `name` in its entry."
) -> str | None:
    """Why ``name`` cannot be a concept's folder name on every file system, or None when it can."""
    if not name.strip():
        return f"no name, and none to take from its path. {remedy}"
    rule = None
    if "/" in name or "\\" in name or name in (".", ".."):
        rule = "must not contain path separators or be '.' or '..'"
    elif len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        rule = (
            f"must be at most {_MAX_NAME_BYTES} bytes long, this one has "
            f"{len(name.encode('utf-8', 'replace'))}"
        )
    elif bad := sorted({c for c in name if c in _UNSAFE_CHARACTERS or not c.isprintable()}):
        rule = f"must not contain {', '.join(map(repr, bad))}"
    elif name != name.strip() or name.startswith(".") or name.endswith("."):
        rule = "must not begin or end with a space or a dot"
    elif name.split(".")[0].casefold() in _DEVICE_NAMES:
        rule = "is a reserved device name on Windows"
    if rule is None:
        return None
    return f"concept name {name!r}: {rule}; it becomes a folder name. {remedy}"


def name_mistakes(entries: Iterable[Entry]) -> list[str]:
    """Why the names of a list cannot be its concepts' folders, a line each."""
    mistakes: list[str] = []
    seen: dict[str, str] = {}
    for entry in entries:
        name = entry.name
        if mistake := check_concept_name(name):
            mistakes.append(f"{entry.where}: {mistake}")
            continue
        # macOS and Windows would put both into one output folder.
        folder = unicodedata.normalize("NFC", name).casefold()
        if folder in seen:
            other = (
                ""
                if seen[folder] == name
                else f" (as {seen[folder]!r}, one folder on some systems)"
            )
            mistakes.append(
                f"{entry.where}: concept name {name!r}: appears twice{other}. Rename one of them."
            )
        seen.setdefault(folder, name)
    return mistakes
