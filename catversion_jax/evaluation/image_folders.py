"""The layout of images to score, the same for every method.

    IMAGES/<concept>/<prompt>_<seed>.png        prompt: its slug, or its number in the set from 0
    IMAGES/<concept>/<prompt>_<seed>.mask.png   object white; made where a masker is given
    IMAGES/<concept>/prior/<class>--<prompt>_<seed>.png    prompts of other classes, concept on
    IMAGES/<concept>/off/..., other/...         concept scaled to 0; as its file says (see prior.py)
    IMAGES/_plain/<class>--<prompt>_<seed>.png  the same without any concept

A PNG that ``catversion generate`` wrote is recognised by the prompt it carries, whatever its name.
The slug of "a dog in the snow" is ``a-dog-in-the-snow``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.array_types import Int
from catversion_jax.concepts.folders import ImageSource, children, is_image_name
from catversion_jax.concepts.images import decode_mask, decode_photo
from catversion_jax.concepts.picture_files import picture_size
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.prompts import EvaluationPrompt
from catversion_jax.sampling.png import read_metadata, slug

PLAIN_FOLDER = "_plain"
_SEEDED = re.compile(r"^(?P<prompt>.+)_(?P<seed>[0-9]+)$")
_MASK_SUFFIX = ".mask.png"


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """One image to score: its file, which prompt of the class's list, which seed."""

    path: Path
    prompt: int
    seed: int


def image_name(prompt: str, seed: int) -> str:
    """File name of one image."""
    return f"{slug(prompt)}_{seed}.png"


def mask_path(image: Path) -> Path:
    """Where an image's mask lies."""
    return image.with_name(image.stem + _MASK_SUFFIX)


def read_pixels(path: Path) -> Int[np.ndarray, "H W 3"]:
    """A generated image.

    Raises:
      CatVersionError: it cannot be read.
    """
    return np.asarray(decode_photo(ImageSource(path.name, path)).picture)


def read_mask(image: Path) -> Int[np.ndarray, "H W"] | None:
    """The mask beside an image, or None.

    Raises:
      CatVersionError: it cannot be read or has another size than its image.
    """
    path = mask_path(image)
    if not path.is_file():
        return None
    drawn = decode_mask(ImageSource(path.name, image, mask=path))
    if drawn is None:
        return None
    mask, size = np.asarray(drawn.grey), picture_size(image)
    if mask.shape != size[::-1]:
        raise CatVersionError(
            f"{path}: is {mask.shape[1]} x {mask.shape[0]} but its image {size[0]} x {size[1]}; "
            "they must be of one size. Make the mask again."
        )
    return mask


def find_images(
    folder: Path,
    prompts: Sequence[EvaluationPrompt],
    base_class: str,
    only: Container[Path] | None = None,
) -> tuple[list[GeneratedImage], list[str]]:
    """The images of one concept in order of prompt and seed, and the names of those that show none
    of the prompts, or are not among ``only``, which an evaluation draws: others are of an earlier
    one with other options.

    Raises:
      CatVersionError: no image of any prompt, or two images of one prompt and seed.
    """
    filled = [prompt.filled(base_class) for prompt in prompts]
    by_name = {str(i): i for i in range(len(filled))} | {slug(p): i for i, p in enumerate(filled)}
    found: dict[tuple[int, int], GeneratedImage] = {}
    others: list[str] = []
    for path in children(folder):
        is_picture = path.is_file() and is_image_name(path)
        if not is_picture or path.name.endswith(_MASK_SUFFIX) or path.stem.startswith("grid-"):
            continue
        where = _recorded(path, filled) or _named(path, by_name)
        if where is None or (only is not None and path not in only):
            others.append(path.name)
        elif where in found:
            raise CatVersionError(
                f"{path}: shows the prompt {filled[where[0]]!r} with seed {where[1]}, and so does "
                f"{found[where].path.name}. Remove one of them."
            )
        else:
            found[where] = GeneratedImage(path, *where)
    if not found:
        raise CatVersionError(
            f"{folder}: holds no image of a prompt of the set (such as "
            f"{image_name(filled[0], 0)!r} or '0_0.png')"
            + (f"; found {', '.join(others[:4])}" if others else "")
            + ". Name images <prompt>_<seed>.png, or give the prompt set they were drawn from."
        )
    return [found[key] for key in sorted(found)], others


def recorded_settings(path: Path) -> dict[str, Any]:
    """How an image of ours was drawn, apart from its prompt, seed and concepts; {} for others."""
    try:
        settings = read_metadata(path)
    except CatVersionError:
        return {}
    own = ("prompt", "negative_prompt", "seed", "concepts", "latents")
    return {k: v for k, v in settings.items() if k not in own and v is not None}


def _recorded(path: Path, filled: Sequence[str]) -> tuple[int, int] | None:
    """Prompt number and seed from the settings a PNG of ours carries."""
    if path.suffix.lower() != ".png":
        return None
    try:
        settings = read_metadata(path)
        return filled.index(settings["prompt"]), int(settings["seed"])
    except (CatVersionError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _named(path: Path, by_name: dict[str, int]) -> tuple[int, int] | None:
    match = _SEEDED.match(path.stem)
    if match is None:
        return None
    name = match["prompt"]
    is_number = name.isascii() and name.isdigit()
    number = by_name.get(str(int(name)) if is_number else name)
    return None if number is None else (number, int(match["seed"]))
