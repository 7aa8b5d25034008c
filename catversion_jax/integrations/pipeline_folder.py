"""Write a complete diffusers folder whose ``pipeline.py`` brings the concepts and the code they
need.

``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` then needs torch, diffusers
and transformers, no package of ours. ``model_index.json`` names the class in ``pipeline.py``, so
that loading gives that class or fails, never the plain model. ``pipeline.py`` is the source of the
files in ``_SOURCES`` one after the other, and the concept files in base64.

Every file is a copy. A hard link would be one file with the model's own, and saving into the folder
writes through it; a symbolic link too, and breaks when either folder moves.
"""

from __future__ import annotations

import ast
import base64
import json
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
    "exported_pipeline.py",
)
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")

_HEADER = '''"""Stable Diffusion with CatVersion concepts: {names}.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

Written by `catversion export --format pipeline`. The class word in a prompt calls its concept.
Change scales with `pipe.set_catversion(name, 0.7)` or `with pipe.scaled(0.7):`.
"""

from __future__ import annotations

'''

_CONCEPTS = """

# ---- The concepts of this folder -----------------------------------------------------------------

CatVersionPipeline.force = {force}
CatVersionPipeline.source = Path(__file__).read_text(encoding="utf-8")
CatVersionPipeline.concepts = {concepts}
"""

_README = """# {title}

A diffusers model folder with CatVersion concepts.

| concept | called by |
|---------|-----------|
{rows}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe("{prompt}").images[0]
```

It needs torch 2.6, diffusers 0.35 and transformers 4.57 or newer. `trust_remote_code=True` lets the
folder's `pipeline.py` run, which loads the concepts; without it the folder does not load. The
folder `catversion/` holds the concept files.
"""


def pipeline_source(concepts: Mapping[str, bytes], *, force: bool = False) -> str:
    """Source of ``pipeline.py`` for concept files given as bytes by name."""
    bodies = [
        _body(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in _SOURCES
    ]
    encoded = {name: base64.b64encode(data).decode() for name, data in concepts.items()}
    entries = "".join(f"    {name!r}: {data!r},\n" for name, data in encoded.items())
    names = ", ".join(concepts).replace("\\", "/").replace('"', "'")
    tail = _CONCEPTS.format(concepts="{\n" + entries + "}", force=force)
    return _HEADER.format(names=names) + "\n\n".join(bodies) + tail


def export_pipeline(
    output: str | Path,
    model_folder: str | Path,
    concepts: Sequence[Concept],
    *,
    force: bool = False,
) -> Path:
    """Write the folder: copies of the model's files, concepts, ``pipeline.py``.

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
            f"{output}: a pipeline folder must lie on this machine, because diffusers reads it as "
            "files. Give a local folder and copy that to the bucket."
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
            _copy_folder(model_folder / name, output / name)
        else:  # a download that left out, say, the safety checker
            index[name] = [None, None]
    index["_class_name"] = ["pipeline", "CatVersionPipeline"]
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


def _copy_folder(source: Path, target: Path) -> None:
    """Files of one component; pickled weights are left out where safetensors are beside them."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    has_safetensors = any(path.suffix == ".safetensors" for path in files)
    for path in files:
        if has_safetensors and path.suffix in _WEIGHTS:
            continue
        copy = target / path.relative_to(source)
        make_folder(copy.parent)
        try:
            shutil.copyfile(path, copy)  # what a link of a hub cache leads to
        except OSError as error:
            raise unwritable(copy, error) from error
