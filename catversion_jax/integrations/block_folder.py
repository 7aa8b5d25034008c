"""Write a folder with a custom block for diffusers' modular pipelines, as the hub holds them.

``ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)`` reads
``modular_config.json``, which names the class in ``block.py``. That is the source of the loader's
files and of ``modular_block.py``, one after the other, and the concept files in base64.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.exported_source import with_concepts_at_end
from catversion_jax.integrations.pipeline_folder import (
    LOADER,
    check_unused,
    joined,
    table_rows,
    write_concept_files,
)
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.per_encoder import check_num_parts
from catversion_jax.runtime.atomic_files import emptied_if_stopped, make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path

_CLASS = "CatVersionTextEncoderStep"
# What the block was tested with: diffusers' modular pipelines are newer than its others.
_REQUIREMENTS = {"diffusers": ">=0.42", "torch": ">=2.6", "transformers": ">=4.57"}

_HEADER = '''"""The text encoder step of Stable Diffusion XL with CatVersion concepts.

A block for modular pipelines, written by `catversion export --format block`; README.md says how.
"""

from __future__ import annotations

'''

_README = """---
library_name: diffusers
tags: [modular-diffusers, stable-diffusion-xl, catversion]
---

# {title}

A block for diffusers' modular pipelines: the text encoder step of Stable Diffusion XL with
CatVersion concepts.

| concept | called by |
|---------|-----------|
{rows}

```python
from diffusers import ModularPipelineBlocks, StableDiffusionXLAutoBlocks

blocks = StableDiffusionXLAutoBlocks()
blocks.sub_blocks["text_encoder"] = ModularPipelineBlocks.from_pretrained(
    folder, trust_remote_code=True
)
pipe = blocks.init_pipeline({model})
pipe.load_components()
pipe(prompt={prompt}, concepts={concepts}, output="images")[0]
```

`concepts` gives scales by name, for that call alone: names of the table, concept files, or hub ids.
Without it all concepts of the table act, at scale 1. `keep_apart=True` lets each concept of a
prompt be seen from its own word up to the next one's only. Where encoding and drawing are two
pipelines, a concept with context states needs both to have the UNet. `trust_remote_code=True` lets
the folder's `block.py` run. The folder `catversion/` holds the concept files.
"""


def export_block(
    output: str | Path,
    concepts: Sequence[Concept],
    *,
    model: str | None = None,
    force: bool = False,
) -> Path:
    """Write ``block.py``, ``modular_config.json``, ``README.md`` and the concept files.

    Args:
      output: a new or empty folder on this machine or in a bucket.
      concepts: at least one, of different names, for Stable Diffusion XL.
      model: that ``README.md`` names; None is the one that the first concept was trained on.
      force: load the concepts whatever text encoders they were trained with.

    What stops it, Ctrl-C included, leaves ``output`` as it was.

    Raises:
      CatVersionError: ``output`` is in use or cannot be written, or a concept is for a model of
        another kind.
    """
    output = as_path(output)
    if not concepts:
        raise CatVersionError("concepts=[]: must be at least one. Train or give some.")
    for concept in concepts:
        check_num_parts(
            concept.name,
            concept.learned,
            2,
            "Stable Diffusion XL, the only model here of which diffusers has modular pipelines,",
            "Use --format pipeline.",
        )
    check_unused(output, "block")
    with emptied_if_stopped(output):
        _write_folder(output, concepts, model, force=force)
    return output


def _write_folder(
    output: Path, concepts: Sequence[Concept], model: str | None, *, force: bool
) -> None:
    make_folder(output)
    data = write_concept_files(concepts, output)
    code = _HEADER + joined((*LOADER, "modular_block.py"))
    source = with_concepts_at_end(code, _CLASS, data, force=force)
    write_atomically(output / "block.py", source.encode())
    first = concepts[0]
    readme = _README.format(
        title=output.name,
        rows=table_rows(concepts),
        # quoted as Python reads it: names may be a stranger's
        model=json.dumps(model or first.base_model or "stabilityai/stable-diffusion-xl-base-1.0"),
        prompt=json.dumps(f"a photo of a {first.base_class}", ensure_ascii=False),
        concepts=json.dumps({first.name: 1.0}, ensure_ascii=False),
    )
    write_atomically(output / "README.md", readme.encode())
    config = {
        "_class_name": _CLASS,
        "auto_map": {"ModularPipelineBlocks": f"block.{_CLASS}"},
        "requirements": _REQUIREMENTS,
    }
    write_atomically(output / "modular_config.json", (json.dumps(config, indent=2) + "\n").encode())
