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
import itertools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import Concept, write_concepts
from catversion_jax.models.weights.model_index import component_class, read_model_index
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
_MOST_FILES = 1000  # of one component
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")

logger = logging.getLogger(__name__)

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
register_connected()
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
    index = read_model_index(model_folder)
    if component_class(index, "text_encoder_2") is not None:
        raise CatVersionError(
            f"{model_folder}: has a second text encoder (text_encoder_2), and a concept knows one "
            "only: its prompts would be half plain. Give a Stable Diffusion 1.x or 2.x model."
        )
    make_folder(output)
    leaving: list[str] = []
    for name, component in index.items():
        if not isinstance(component, list) or component[0] is None:
            continue
        if (model_folder / name).is_dir():
            leaving += _copy_folder(model_folder / name, output / name, model_folder)
        else:  # a download that left out, say, the safety checker
            index[name] = [None, None]
    if (index.get("text_encoder") or [None, None])[1] == "CLIPTextModel":
        name_for_older_transformers(output / "text_encoder")
    if leaving:
        logger.warning(
            "%s: links lead out of the model folder, and what they lead to is copied into %s; make "
            "sure that it may be there: %s",
            model_folder,
            output,
            ", ".join(leaving[:5]) + (f" and {len(leaving) - 5} more" if len(leaving) > 5 else ""),
        )
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


def name_for_older_transformers(text_encoder: Path) -> None:
    """Give the tensors of a CLIPTextModel's folder the prefix ``text_model.``.

    transformers before 5.6 writes it and reads no other names: it would go on with random weights.
    Newer ones write names without it and read both. Damaged files, and those of an index, stay.

    Raises:
      CatVersionError: a file cannot be written.
    """
    from safetensors import SafetensorError, safe_open

    if any(text_encoder.glob("*.index.json")):
        return
    for file in text_encoder.glob("*.safetensors"):
        try:
            with safe_open(file, "np") as whole:
                named = any(key.startswith("text_model.") for key in whole.keys())  # noqa: SIM118
        except SafetensorError:
            continue
        if not named:
            try:
                _prefix_names(file)
            except OSError as error:
                raise unwritable(file, error) from error


def _prefix_names(file: Path) -> None:
    renamed = file.with_suffix(".renamed")
    with file.open("rb") as old, renamed.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header = {k if k == "__metadata__" else f"text_model.{k}": v for k, v in header.items()}
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-len(data) % 8)
        new.write(len(data).to_bytes(8, "little") + data)
        shutil.copyfileobj(old, new)
    renamed.replace(file)


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


def _copy_folder(source: Path, target: Path, model_folder: Path) -> list[str]:
    """Copy the files of one component; pickled weights are left out where safetensors are beside
    them. What a link leads to is copied, never the link.

    Returns:
      The links that lead out of the model folder, and where to.

    Raises:
      CatVersionError: more files than a component has, or one cannot be copied.
    """
    found = (path for path in source.rglob("*") if path.is_file())
    files = sorted(itertools.islice(found, _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        raise CatVersionError(
            f"{source}: holds more than {_MOST_FILES} files, no component of a model does. Give a "
            "diffusers folder as --model."
        )
    has_safetensors = any(path.suffix == ".safetensors" for path in files)
    leaving = []
    for path in files:
        if has_safetensors and path.suffix in _WEIGHTS:
            continue
        if not _belongs_to(path.resolve(), model_folder):
            leaving.append(f"{path.relative_to(model_folder)} -> {path.resolve()}")
        copy = target / path.relative_to(source)
        make_folder(copy.parent)
        try:
            shutil.copyfile(path, copy)
        except OSError as error:
            raise unwritable(copy, error) from error
    return leaving


def _belongs_to(file: Path, model_folder: Path) -> bool:
    """Whether a file lies in the model folder, or is where a hub cache keeps that folder's files:
    ``models--X/snapshots/COMMIT`` holds links to ``models--X/blobs``.
    """
    folder = model_folder.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1] / "blobs")
    return any(file.is_relative_to(home) for home in homes)
