"""Names of concepts, which are names of folders on every file system."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from catversion_jax.concepts.entries import Entry
from catversion_jax.errors import CatVersionError, encodable, shown
from catversion_jax.runtime.alike_names import folded

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
    return f"concept name {shown(name)}: {rule}; it becomes a folder name. {remedy}"


def with_sound_names(entries: Iterable[Entry]) -> list[Entry]:
    """The entries; one whose name cannot be a folder's gets a similar one, and a problem.

    An entry with a problem of its own makes way where another has its name.

    Raises:
      CatVersionError: two of them would share a folder; the message lists all of those.
    """
    sound: list[Entry] = []
    renamed: list[tuple[int, Entry, str]] = []
    mistakes: list[str] = []
    seen: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        name = entry.name
        sound.append(entry)
        if mistake := check_concept_name(name):
            problem = entry.problem if not name.strip() else None
            renamed.append((number, entry, problem or f"{entry.where}: {mistake}"))
        elif entry.problem is not None:
            renamed.append((number, entry, entry.problem))
        elif (folder := folded(name)) not in seen:
            seen[folder] = name
        else:
            other = (
                ""
                if seen[folder] == name
                else f" (as {seen[folder]!r}, one folder on some systems)"
            )
            mistakes.append(
                f"{entry.where}: concept name {name!r}: appears twice{other}. Rename one of them."
            )
    if mistakes:
        raise CatVersionError("\n".join([*mistakes, *(problem for _, _, problem in renamed)]))
    for number, entry, problem in renamed:
        name = _similar(entry.name, number)
        while folded(name) in seen:
            name = f"{name} entry {number}"
        seen[folded(name)] = name
        sound[number - 1] = dataclasses.replace(entry, name=name, problem=problem)
    return sound


def _similar(name: str, number: int) -> str:
    """``name`` or, where that cannot be a folder's, one that can, for the report of an entry."""
    if check_concept_name(name) is None:
        return name
    plain = re.sub(r"[^A-Za-z0-9]+", "_", encodable(name)[:200]).strip("_")[:40]
    return f"entry {number}" if not plain or check_concept_name(plain) else plain
