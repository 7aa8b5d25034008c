"""What ships with the package: the model ``tiny-sd`` and the concepts ``tiny-sd-examples``.

Both names stand wherever a model or concepts are named. A folder of that name in the working
directory wins, as for any path. ``tiny-sd/README.md`` is the model card; ``tools/tiny_sd`` in the
repository made everything here.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODEL, EXAMPLE_CONCEPTS = "tiny-sd", "tiny-sd-examples"


def embedded_folder(name: str | Path) -> Path | None:
    """The folder of one of the two names, or None for any other name or an existing path."""
    if str(name) not in (EMBEDDED_MODEL, EXAMPLE_CONCEPTS) or Path(name).exists():
        return None
    return Path(__file__).parent / str(name)
