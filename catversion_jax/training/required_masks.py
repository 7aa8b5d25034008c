"""The object masks that a loss needs: those that were given, checked, and made ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from catversion_jax.concepts import ConceptSpec
from catversion_jax.concepts.images import LoadedImage
from catversion_jax.concepts.mask_values import EMPTY_SHARE
from catversion_jax.concepts.quarantine import grouped
from catversion_jax.config import ObjectiveOptions
from catversion_jax.errors import CatVersionError, ConceptError, shown
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.sampling.class_word_masks import class_word_masks

logger = logging.getLogger(__name__)


def with_required_masks(
    images: Sequence[LoadedImage],
    spec: ConceptSpec,
    objective: ObjectiveOptions,
    backbone: Backbone,
) -> Sequence[LoadedImage]:
    """``images`` with a mask each.

    Args:
      images: of the concept, ``[R R 3]``, with the masks that were given.
      spec: the concept.
      objective: the loss, and whether masks that are missing are made (``make_masks``).
      backbone: makes them, from its attention to the base class.

    Raises:
      ConceptError: a mask is missing and none is made, or one looks wrong.
    """
    asked = objective.needs_masks
    faults = [(i.label, f"the mask {i.mask_fault}") for i in images if i.mask_fault]
    if faults:
        raise ConceptError(
            f"{spec.name}: {asked}, but {len(faults)} of {len(images)} masks look "
            f"wrong ({'; '.join(grouped(faults)[:3])}). Correct them, or say what the object is "
            'in them with "mask_polarity": "white" or "black" in concept.json.'
        )
    missing = [image.label for image in images if image.mask is None]
    if not missing:
        return images
    if objective.make_masks and not backbone.inpaints:
        return _with_made_masks(images, spec, backbone)
    made = (
        "catversion masks makes them with the text-to-image model of the same family"
        if backbone.inpaints
        else "catversion masks makes them, and so does make_masks=true"
    )
    without = "masked_training=false" if objective.masked_training else "preserve_weight=0"
    raise ConceptError(
        f"{spec.name}: {asked}, but {len(missing)} of {len(images)} images have no mask "
        f"({', '.join(missing[:3])}). Add x.mask.png beside each ({made}), or use alpha=mask or "
        f"{without} with another output_dir."
    )


def _with_made_masks(
    images: Sequence[LoadedImage], spec: ConceptSpec, backbone: Backbone
) -> list[LoadedImage]:
    """An image in which the model finds nothing counts as object altogether."""
    missing = [index for index, image in enumerate(images) if image.mask is None]
    pixels = np.stack([images[index].picture for index in missing])
    try:
        masks = class_word_masks(backbone, pixels, [spec.base_class] * len(missing)) / 255
    except CatVersionError as error:
        raise ConceptError(f"{spec.name}: its masks cannot be made: {error}") from error
    logger.info(
        f"{spec.name}: masks of {len(missing)} of {len(images)} images made from the model's "
        f"attention to {shown(spec.base_class)}"
    )
    found = list(images)
    for index, mask in zip(missing, masks.astype(np.float32), strict=True):
        seen = mask if mask.mean() >= EMPTY_SHARE else np.ones_like(mask)
        found[index] = dataclasses.replace(images[index], mask=seen)
    return found
