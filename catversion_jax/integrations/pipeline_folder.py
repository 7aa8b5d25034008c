"""Write a complete diffusers folder whose ``pipeline.py`` brings the concepts and the code they
need.

``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` then needs torch, diffusers
and transformers, no package of ours. ``model_index.json`` names the class in ``pipeline.py``, so
that loading gives that class or fails, never the plain model. ``pipeline.py`` is the source of the
files in ``LOADER``, of ``exported_pipeline.py`` and of one in ``_PIPELINES``, one after the other,
and the concept files in base64.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.exported_source import with_concepts_at_end
from catversion_jax.methods.concept_file import Concept, write_concepts
from catversion_jax.methods.per_encoder import check_num_parts
from catversion_jax.models.components_fit import inpainting_channels
from catversion_jax.models.weights.model_files import ModelFiles, opened
from catversion_jax.models.weights.model_index import EXPORTED_CONCEPTS
from catversion_jax.runtime.alike_names import folded
from catversion_jax.runtime.atomic_files import emptied_if_stopped, unwritable, write_atomically
from catversion_jax.runtime.bucket_paths import as_path, is_in_bucket

LOADER = (  # in the order of their imports
    "../runtime/concept_packs.py",
    "loaded_concept.py",
    "shared_softmax.py",
    "concept_attention.py",
    "encoder_wrapping.py",
    "word_places.py",
    "asked_here.py",
    "encoder_state.py",
    "weights_sha256.py",
    "encoder_fingerprint.py",
    "concept_source.py",
    "pipeline_encoders.py",
    "context_states.py",
    "told_pipeline.py",
    "diffusers.py",
    "exported_source.py",
)
# By the number of text encoders and whether it inpaints: the file of the pipeline class, its name.
_PIPELINES = {
    (1, False): ("exported_sd_pipeline.py", "CatVersionPipeline"),
    (1, True): ("exported_sd_inpaint_pipeline.py", "CatVersionInpaintPipeline"),
    (2, False): ("exported_xl_pipeline.py", "CatVersionXLPipeline"),
    (2, True): ("exported_xl_inpaint_pipeline.py", "CatVersionXLInpaintPipeline"),
}

_HEADER = '''"""Stable Diffusion with CatVersion concepts: {names}.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

Written by `catversion export --format pipeline`. The class word in a prompt calls its concept.
`pipe.set_catversion(name, 0.7)` chooses for all calls, `with pipe.chosen(name, 0.7):` for one.
"""

from __future__ import annotations

'''

_README = """# {title}

A diffusers model folder with CatVersion concepts.

| concept | called by |
|---------|-----------|
{rows}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe({prompt}{more}).images[0]
```

It needs torch 2.6, diffusers 0.35 and transformers 4.57 or newer. `trust_remote_code=True` lets the
folder's `pipeline.py` run, which loads the concepts; without it the folder does not load. The
folder `catversion/` holds the concept files.
"""


def pipeline_source(
    concepts: Mapping[str, bytes],
    *,
    num_text_encoders: int = 1,
    inpaints: bool = False,
    force: bool = False,
) -> str:
    """Source of ``pipeline.py`` for concept files given as bytes by name."""
    pipeline_file, class_name = _PIPELINES[num_text_encoders, inpaints]
    names = ", ".join(concepts).replace("\\", "/").replace('"', "'")
    code = _HEADER.format(names=names) + joined((*LOADER, "exported_pipeline.py", pipeline_file))
    return with_concepts_at_end(code, class_name, concepts, force=force)


def joined(files: Sequence[str]) -> str:
    """The code of files of this room, one after the other, as one module."""
    return "\n\n".join(
        _body((Path(__file__).parent / file).read_text(encoding="utf-8")) for file in files
    )


def export_pipeline(
    output: str | Path,
    model: str | Path | ModelFiles,
    concepts: Sequence[Concept],
    *,
    force: bool = False,
) -> Path:
    """Write the folder: copies of the model's files (of a single file what it holds, in diffusers'
    form), concepts, ``pipeline.py``.

    Args:
      output: a new or empty folder.
      model: a diffusers folder or a single file on this machine, or one already opened.
      concepts: at least one, of different names.
      force: load the concepts even though the text encoder is not the one they were trained with.

    What stops it, Ctrl-C included, leaves ``output`` as it was.

    Raises:
      CatVersionError: ``output`` is in use or cannot be written, or the model cannot be used.
    """
    output = as_path(output)
    if not concepts:
        raise CatVersionError("concepts=[]: must be at least one. The model alone needs no export.")
    if is_in_bucket(output):
        raise CatVersionError(
            f"{output}: a pipeline folder must lie on this machine, because diffusers reads it as "
            "files. Give a local folder and copy that to the bucket."
        )
    check_unused(output, "pipeline")
    files = opened(model)
    check_parts(files, concepts)
    with emptied_if_stopped(output):
        _write_folder(output, files, concepts, force)
    return output


def check_unused(output: Path, what: str) -> None:
    """Check that a folder for a pipeline, or for ``what`` else is written, is new or empty.

    Raises:
      CatVersionError: it is not.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CatVersionError(
            f"{output}: exists and is not an empty folder. Give a new folder for the {what}."
        )


def write_concept_files(concepts: Sequence[Concept], output: Path) -> dict[str, bytes]:
    """Write the concept files into an exported folder; returns their bytes by name."""
    files = write_concepts(concepts, output / EXPORTED_CONCEPTS)
    return {concept.name: file.read_bytes() for concept, file in zip(concepts, files, strict=True)}


def table_rows(concepts: Sequence[Concept]) -> str:
    """The rows of an exported folder's README: each concept, and what calls it. Of several concepts
    of one class the last one acts, until others are chosen.
    """
    acting = {folded(c.base_class): c.name for c in concepts if c.when == "class_word"}

    def calls(concept: Concept) -> str:
        if concept.when != "class_word":
            return "every prompt"
        other = acting[folded(concept.base_class)]
        chosen = "" if other == concept.name else f", once it is chosen in place of {other}"
        return f"{concept.base_class}{chosen}"

    return "\n".join(f"| {concept.name} | {calls(concept)} |" for concept in concepts)


def _write_folder(
    output: Path, files: ModelFiles, concepts: Sequence[Concept], force: bool
) -> None:
    index = files.save_to(output)
    if (index.get("text_encoder") or [None, None])[1] == "CLIPTextModel":
        name_for_older_transformers(output / "text_encoder")
    num_text_encoders = len(files.text_encoders)
    latents = files.config("vae").get("latent_channels", 4)
    inpaints = files.config("unet").get("in_channels", 4) == inpainting_channels(latents)
    index["_class_name"] = ["pipeline", _PIPELINES[num_text_encoders, inpaints][1]]
    if num_text_encoders == 1:
        index["requires_safety_checker"] = bool((index.get("safety_checker") or [None])[0])
    data = write_concept_files(concepts, output)
    write_atomically(
        output / "model_index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    )
    rows = table_rows(concepts)
    # quoted as Python reads it: the class word may be a stranger's
    prompt = json.dumps(f"a photo of a {concepts[0].base_class}", ensure_ascii=False)
    more = ", image=photo, mask_image=where" if inpaints else ""
    readme = _README.format(title=output.name, rows=rows, prompt=prompt, more=more)
    write_atomically(output / "README.md", readme.encode())
    source = pipeline_source(
        data, num_text_encoders=num_text_encoders, inpaints=inpaints, force=force
    )
    write_atomically(output / "pipeline.py", source.encode())


def check_parts(files: ModelFiles, concepts: Sequence[Concept]) -> None:
    """Check that concepts have a part for each of a model's text encoders.

    Raises:
      CatVersionError: one has another number of parts.
    """
    for concept in concepts:
        check_num_parts(
            concept.name,
            concept.learned,
            len(files.text_encoders),
            str(files.path),
            "Give as --model the one it was trained with: "
            f"{concept.base_model or 'not stated in the file'}.",
        )


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
