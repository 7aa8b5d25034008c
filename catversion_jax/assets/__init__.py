"""What ships with the package: the model ``tiny-sd``, the concepts ``tiny-sd-examples``, the judge
``tiny-sd-judge``, the YAML files of ``configs/``, and the merges of CLIP's tokenizer.

These names can be given wherever a model, concepts or a judge are named. A folder of that name in
the working directory wins, as for any path. ``tiny-sd/README.md`` is the model card;
``tools/tiny_sd`` in the repository made all three. ``configs`` is a link to the
repository's folder; a wheel and an sdist hold the files themselves.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODEL, EXAMPLE_CONCEPTS = "tiny-sd", "tiny-sd-examples"
EMBEDDED_JUDGE = "tiny-sd-judge"
"""What looks at pictures of the model's world in its own way: ``--dino tiny-sd-judge``."""
SHIPPED_CONFIGS = Path(__file__).parent / "configs"
"""Folder of the YAML files that have a name, such as ``quickstart``."""
CLIP_MERGES = Path(__file__).parent / "clip-tokenizer" / "merges.txt.gz"
"""Hugging Face's merges.txt of CLIP-L, compressed; ``NOTICE`` beside it says whose it is."""


def embedded_folder(name: str | Path) -> Path | None:
    """The folder of one of the three names, or None for any other name or an existing path."""
    names = (EMBEDDED_MODEL, EXAMPLE_CONCEPTS, EMBEDDED_JUDGE)
    if str(name) not in names or Path(name).exists():
        return None
    return Path(__file__).parent / str(name)
