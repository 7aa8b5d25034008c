"""Write a complete diffusers folder whose ``pipeline.py`` brings the concepts and the code they
need.

``DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)`` then needs torch, diffusers
and transformers, no package of ours; diffusers 0.42 asks for ``trust_remote_code=True`` with any
custom pipeline. ``pipeline.py`` is the source of ``loaded_concept.py``, ``concept_attention.py``
and ``diffusers.py`` one after the other, the concept files in base64, and a pipeline class that
loads them when it is made.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import Concept, write_concepts
from catversion_jax.runtime.atomic_files import make_folder, unwritable, write_atomically
from catversion_jax.runtime.bucket_paths import as_path, is_in_bucket

_SOURCES = (
    "loaded_concept.py",
    "concept_attention.py",
    "encoder_state.py",
    "encoder_fingerprint.py",
    "concept_source.py",
    "told_pipeline.py",
    "diffusers.py",
)
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")

_HEADER = '''"""Stable Diffusion with CatVersion concepts: {names}.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

Written by `catversion export --format pipeline`. The class word in a prompt calls its concept.
Change scales with `pipe.set_catversion(name, 0.7)`.
"""

from __future__ import annotations

'''

_PIPELINE = '''

# ---- The concepts of this folder and the pipeline that loads them --------------------------------

import base64
import functools

from diffusers import StableDiffusionPipeline

_CONCEPTS = {concepts}


class CatVersionPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline with the concepts above loaded and active."""

    @functools.wraps(StableDiffusionPipeline.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.text_encoder is not None:
            for name, data in _CONCEPTS.items():
                source = f"concept {{name!r}} of this pipeline"
                load_bytes(self, base64.b64decode(data), source, name, {force})

    def set_catversion(self, name, scale=1.0, *, plain_prompts=None):
        """See the function of that name."""
        set_catversion(self, name, scale, plain_prompts=plain_prompts)
'''

_README = """# {title}

A diffusers model folder with CatVersion concepts.

| concept | called by |
|---------|-----------|
{rows}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe("{prompt}").images[0]
```

Without `custom_pipeline` the folder is the plain model. The folder `catversion/` holds the concept
files.
"""


def pipeline_source(concepts: Mapping[str, bytes], *, force: bool = False) -> str:
    """Source of ``pipeline.py`` for concept files given as bytes by name."""
    bodies = [
        _body(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in _SOURCES
    ]
    encoded = {name: base64.b64encode(data).decode() for name, data in concepts.items()}
    entries = "".join(f"    {name!r}: {data!r},\n" for name, data in encoded.items())
    names = ", ".join(concepts).replace("\\", "/").replace('"', "'")
    tail = _PIPELINE.format(concepts="{\n" + entries + "}", force=force)
    return _HEADER.format(names=names) + "\n\n".join(bodies) + tail


def export_pipeline(
    output: str | Path,
    model_folder: str | Path,
    concepts: Sequence[Concept],
    *,
    force: bool = False,
) -> Path:
    """Write the folder: model files (hard links where the disk allows, else copies), concepts,
    ``pipeline.py``.

    Args:
      output: a new or empty folder.
      model_folder: a diffusers folder.
      concepts: at least one, of different names.
      force: load the concepts even though the text encoder is not the one they were trained with.

    Raises:
      CatVersionError: ``output`` is in use or cannot be written, or the model folder is incomplete.
    """
    output, model_folder = as_path(output), as_path(model_folder)
    if is_in_bucket(output):
        raise CatVersionError(
            f"{output}: a pipeline folder must lie on this machine, because the model's files are "
            "linked into it. Give a local folder and copy that to the bucket."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CatVersionError(
            f"{output}: exists and is not an empty folder. Give a new folder for the pipeline."
        )
    index = _read_index(model_folder)
    make_folder(output)
    for name, component in index.items():
        if not isinstance(component, list) or component[0] is None:
            continue
        if (model_folder / name).is_dir():
            _link_folder(model_folder / name, output / name)
        else:  # a download that left out, say, the safety checker
            index[name] = [None, None]
    index["requires_safety_checker"] = bool((index.get("safety_checker") or [None])[0])
    files = write_concepts(concepts, output / "catversion")
    data = {concept.name: file.read_bytes() for concept, file in zip(concepts, files, strict=True)}
    write_atomically(
        output / "model_index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    )
    rows = "\n".join(
        f"| {c.name} | {c.base_class if c.when == 'class_word' else 'every prompt'} |"
        for c in concepts
    )
    prompt = f"a photo of a {concepts[0].base_class}"
    readme = _README.format(title=output.name, rows=rows, prompt=prompt)
    write_atomically(output / "README.md", readme.encode())
    write_atomically(output / "pipeline.py", pipeline_source(data, force=force).encode())
    return output


def _body(source: str) -> str:
    """A module without its docstring, ``__future__`` line and imports of this package."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "__future__",
            "catversion_jax",
        )
        if docstring or ours:
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines).strip() + "\n"


def _read_index(model_folder: Path) -> dict[str, Any]:
    try:
        return json.loads((model_folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatVersionError(
            f"{model_folder}: no readable model_index.json ({error}). Give a diffusers folder as "
            "--model."
        ) from error


def _link_folder(source: Path, target: Path) -> None:
    """Files of one component; pickled weights are left out where safetensors are beside them."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    has_safetensors = any(path.suffix == ".safetensors" for path in files)
    for path in files:
        if has_safetensors and path.suffix in _WEIGHTS:
            continue
        copy = target / path.relative_to(source)
        make_folder(copy.parent)
        try:
            os.link(path.resolve(), copy)  # a hub cache holds links to the real files
        except OSError:
            try:
                shutil.copyfile(path, copy)
            except OSError as error:
                raise unwritable(copy, error) from error
