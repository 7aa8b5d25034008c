"""Drawing what is to be scored, in the layout of ``image_folders.py``.

All concepts and prompts go through one compiled program, page by page. An image that is there with
exactly the settings it would be drawn with is kept, so an interrupted evaluation continues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.evaluation.image_folders import image_name, mask_path, read_pixels
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.evaluation.subjects import Subject
from catversion_jax.methods.concept_file import load_concept
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.sampling.pages import ImageMetadata, draw_pages, says_the_same
from catversion_jax.sampling.png import read_metadata, save_png
from catversion_jax.sampling.requests import ConceptUse, ImageRequest


@dataclasses.dataclass(frozen=True)
class PlannedImage:
    """One image and where it goes."""

    path: Path
    request: ImageRequest


def plan_images(
    folder: Path,
    subjects: Sequence[Subject],
    prompt_set: PromptSet,
    seeds: Sequence[int],
    *,
    step: int | None = None,
    scale: float = 1.0,
    plain: bool = False,
) -> list[PlannedImage]:
    """Every prompt and seed of every concept that has something learned; of all when ``plain``.

    Args:
      folder: receives ``<concept>/<prompt>_<seed>.png``.
      subjects: the concepts.
      prompt_set: the prompts of each class.
      seeds: the same for every prompt and concept.
      step: draw with the concept file of this step instead of the final one; concepts without it
        are left out.
      scale: strength of the concepts.
      plain: draw without any concept.
    """
    planned = []
    for subject in subjects:
        concept = subject.concept
        if step is not None:
            file = subject.steps().get(step)
            concept = None if file is None else load_concept(file)
        if concept is None and not plain:
            continue
        uses = () if plain or concept is None else (ConceptUse.of(concept, scale=scale),)
        for prompt in prompt_set.of(subject.base_class):
            text = prompt.filled(subject.base_class)
            planned += [
                PlannedImage(
                    folder / subject.name / image_name(text, seed), ImageRequest(text, uses, seed)
                )
                for seed in seeds
            ]
    return planned


def draw_missing(
    backbone: Backbone,
    planned: Sequence[PlannedImage],
    settings: SamplingSettings,
    on_image: Callable[[int], None] | None = None,
) -> int:
    """Draw and write the planned images that are not there yet.

    Args:
      backbone: the model.
      planned: no two with one path.
      settings: how to draw; ``batch_size`` is part of what makes an image the same.
      on_image: called with the number of images newly done.

    Returns:
      The number of images that were drawn.

    Raises:
      CatVersionError: an image cannot be written.
    """
    by_path = dict[Path, PlannedImage]()
    for image in planned:
        if (first := by_path.setdefault(image.path, image)) is not image:
            raise CatVersionError(
                f"{image.path}: two images of this evaluation would get this file: "
                f"{shown(first.request.prompt)} and {shown(image.request.prompt)}. Prompts and "
                "class words must differ in a letter or digit, prompts in their first 150 bytes."
            )
    describe = ImageMetadata(backbone, settings)
    wanted = [(image, describe(image.request)) for image in planned]
    todo = [(image, metadata) for image, metadata in wanted if not _is_there(image.path, metadata)]
    for page in draw_pages(backbone, [image.request for image, _ in todo], settings):
        of_page = todo[page.start : page.start + len(page.images)]
        for pixels, (image, metadata) in zip(page.images, of_page, strict=True):
            make_folder(image.path.parent)
            mask_path(image.path).unlink(missing_ok=True)  # of the picture that was there before
            save_png(image.path, pixels, metadata)
        if on_image is not None:
            on_image(len(page.images))
    return len(todo)


def _is_there(path: Path, metadata: dict[str, Any]) -> bool:
    """Whether an image was drawn as it would be now, and can still be decoded."""
    try:
        if not path.is_file() or not says_the_same(read_metadata(path), metadata):
            return False
        read_pixels(path)
        return True
    except CatVersionError:
        return False
