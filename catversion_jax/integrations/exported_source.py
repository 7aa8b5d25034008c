"""The end of a ``pipeline.py`` or ``block.py``: the concepts that it brings. A folder that is saved
gets the same code with an end of its own.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

_LINE = "# ---- The concepts of this folder " + 65 * "-"
_END = """
{line}

{name}.force = {force}
{name}.source = Path(__file__).read_text(encoding="utf-8")
{name}.concepts = {concepts}
{name}.choice = {choice!r}
register_connected()
"""


def with_concepts_at_end(
    code: str,
    class_name: str,
    concepts: Mapping[str, bytes],
    *,
    choice: Mapping[str, Any] | None = None,
    force: bool = False,
) -> str:
    """The code without the concepts that it may end with, and with others.

    Args:
      code: Python.
      class_name: of the class that brings them.
      concepts: files by name.
      choice: what :class:`ConceptPipeline` says of its concepts; None: as they come when loaded.
      force: load them whatever text encoders they were trained with.
    """
    before, found, _ = code.rpartition(_LINE)
    encoded = {name: base64.b64encode(data).decode() for name, data in concepts.items()}
    entries = "".join(f"    {name!r}: {data!r},\n" for name, data in encoded.items())
    end = _END.format(
        line=_LINE,
        name=class_name,
        force=force,
        concepts="{\n" + entries + "}",
        choice=None if choice is None else dict(choice),
    )
    return (before if found else code).rstrip("\n") + "\n\n" + end
