"""Images in the layout that DreamBench++ (arXiv 2406.16855) reads, for judges outside this house.

    OUT/src_image/<concept>/<prompt>_<n>.jpg     a photo of the concept, in turn for n = 0, 1, ...
    OUT/text/<concept>/<prompt>_<n>.txt          the prompt
    OUT/tgt_image/<concept>/<prompt>_<n>.jpg     the drawn picture
    OUT/negative_prompt.txt                      empty

``<prompt>`` is the prompt's number in the set and ``<n>`` the number of its picture. Source:
yuangpeng/dreambench_plus, README "Step 2", ``eval_clip_and_dino.py`` (``--dir OUT``) and
``eval_concept_preservation.py``, which reads the pictures with n = 0.
"""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from catversion_jax.array_types import Int
from catversion_jax.errors import CatVersionError, listed
from catversion_jax.evaluation.image_folders import find_images, read_pixels
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.evaluation.subjects import References, Subject
from catversion_jax.runtime.atomic_files import make_folder, write_atomically

_KINDS = ("src_image", "text", "tgt_image")
_JPEG_QUALITY = 95
_FILE = re.compile(r"\d+_\d+\.(jpg|txt)")


def export_dreambench_plus(
    output: Path,
    images: Path,
    subjects: Sequence[Subject],
    references: Mapping[str, References],
    prompt_set: PromptSet,
    only: Container[Path] | None = None,
) -> int:
    """Write the images of every concept that was evaluated.

    Args:
      output: the folder of this method; what an earlier export of these concepts wrote is replaced.
      images: holds ``<concept>/<prompt>_<seed>.png``.
      subjects: the concepts.
      references: their photos; of held-out ones these are written. Concepts without are left out.
      prompt_set: the prompts.
      only: the images that are written; None is all.

    Returns:
      The number of drawn pictures.

    Raises:
      CatVersionError: an image cannot be read, a file not written, or the folder holds something
        else.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / "tgt_image").is_dir():
        raise CatVersionError(
            f"{output}: holds other files. Give a new folder for DreamBench++'s layout."
        )
    held = {path.name for path in (output / "tgt_image").glob("*") if any(path.iterdir())}
    if strangers := sorted(held - references.keys()):
        raise CatVersionError(
            f"{output}: holds pictures of {', '.join(listed(strangers, 3))}, which are not of this "
            "evaluation. Give a new folder."
        )
    written = 0
    for subject in subjects:
        if subject.name not in references:
            continue
        photos = references[subject.name].judged_by.pictures
        prompts = prompt_set.of(subject.base_class)
        found, _ = find_images(images / subject.name, prompts, subject.base_class, only)
        turns: collections.Counter[int] = collections.Counter()
        folders = {kind: output / kind / subject.name for kind in _KINDS}
        for folder in folders.values():
            make_folder(folder)
            for path in folder.iterdir():
                if _FILE.fullmatch(path.name):
                    path.unlink()
        for image in found:
            stem = f"{image.prompt}_{turns[image.prompt]}"
            photo = photos[turns[image.prompt] % len(photos)]
            turns[image.prompt] += 1
            text = prompts[image.prompt].filled(subject.base_class)
            write_atomically(folders["src_image"] / f"{stem}.jpg", _jpeg(photo))
            write_atomically(folders["text"] / f"{stem}.txt", text.encode())
            write_atomically(folders["tgt_image"] / f"{stem}.jpg", _jpeg(read_pixels(image.path)))
            written += 1
    write_atomically(output / "negative_prompt.txt", b"")
    return written


def _jpeg(pixels: Int[np.ndarray, "H W 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="jpeg", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
