"""Drawing what is to be scored, in the layout of ``image_folders.py``.

All concepts and prompts go through one compiled program, page by page. An image that is there with
exactly the settings it would be drawn with is kept, so an interrupted evaluation continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from catversion_jax import __version__
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.image_folders import image_name, mask_path
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.evaluation.subjects import Subject
from catversion_jax.methods.concept_file import Concept, load_concept
from catversion_jax.methods.learned import named_arrays, settings_of
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.png import read_metadata, save_png
from catversion_jax.sampling.requests import ConceptUse, ImageRequest

IMAGES_PER_PAGE = 64


@dataclasses.dataclass(frozen=True)
class PlannedImage:
    """One image and where it goes."""

    path: Path
    request: ImageRequest


def concept_use(concept: Concept, *, scale: float = 1.0, when: str | None = None) -> ConceptUse:
    """A trained concept as its file says, unless told otherwise."""
    return ConceptUse(
        concept.name, concept.base_class, concept.learned, scale, when or concept.when
    )


def plan_images(
    folder: Path,
    subjects: Sequence[Subject],
    prompt_set: PromptSet,
    seeds: Sequence[int],
    *,
    step: int | None = None,
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
      plain: draw without any concept.
    """
    planned = []
    for subject in subjects:
        concept = subject.concept
        if step is not None:
            concept = load_concept(subject.steps()[step]) if step in subject.steps() else None
        if concept is None and not plain:
            continue
        uses = () if plain or concept is None else (concept_use(concept),)
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
      How many were drawn.

    Raises:
      CatVersionError: an image cannot be written.
    """
    by_path = {image.path: image for image in planned}
    if len(by_path) != len(planned):
        raise CatVersionError(
            "two images of this evaluation would get the same file: prompts of the set that differ "
            "only in punctuation, or a repeated seed. Keep one of them."
        )
    digests: dict[int, str] = {}
    wanted = [(image, _metadata(backbone, settings, image.request, digests)) for image in planned]
    todo = [(image, metadata) for image, metadata in wanted if not _is_there(image.path, metadata)]
    for start in range(0, len(todo), IMAGES_PER_PAGE):
        page = todo[start : start + IMAGES_PER_PAGE]
        drawn = draw_requests(backbone, [image.request for image, _ in page], settings).images
        for pixels, (image, metadata) in zip(drawn, page, strict=True):
            make_folder(image.path.parent)
            mask_path(image.path).unlink(missing_ok=True)  # of the picture that was there before
            save_png(image.path, pixels, metadata)
        if on_image is not None:
            on_image(len(page))
    return len(todo)


def _is_there(path: Path, metadata: dict[str, Any]) -> bool:
    try:
        return path.is_file() and read_metadata(path) == metadata
    except CatVersionError:
        return False


def _metadata(
    backbone: Backbone,
    settings: SamplingSettings,
    request: ImageRequest,
    digests: dict[int, str],
) -> dict[str, Any]:
    """Everything that decides the image."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "concepts": [
            {
                "name": use.name,
                "base_class": use.base_class,
                "scale": use.scale,
                "when": use.when,
                "sha256": digests.setdefault(id(use.learned), _learned_sha256(use)),
            }
            for use in request.concepts
        ],
        **dataclasses.asdict(settings),
        "model": backbone.name,
        "text_encoder_sha256": backbone.text_encoder_sha256,
        "platform": jax.default_backend(),
        "software": f"catversion_jax {__version__}",
    }


def _learned_sha256(use: ConceptUse) -> str:
    """Of everything that was learned, whatever its kind."""
    settings = json.dumps(settings_of(use.learned), sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for leaf in named_arrays(use.learned).values():
        digest.update(np.ascontiguousarray(np.asarray(leaf, "<f4")).tobytes())
    return digest.hexdigest()
