"""Which variant of its weight files each component of a model folder is read in.

Hub models often hold an fp16 UNet beside a text encoder without variants. Then asking for
``fp16`` means the UNet's, and the plain files of the component that has no others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from catversion_jax.models.weights.model_index import component_class, read_model_index
from catversion_jax.models.weights.safetensors_files import STEMS, weight_files

logger = logging.getLogger(__name__)

COMPONENTS = {
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
"""What has weights in a Stable Diffusion folder, and the class each must be of."""

SECOND_TEXT_ENCODER = {"text_encoder_2": "CLIPTextModelWithProjection"}
"""What Stable Diffusion XL has beside them."""

TEXT_ENCODERS = ("text_encoder", *SECOND_TEXT_ENCODER)
TOKENIZERS = dict(zip(TEXT_ENCODERS, ("tokenizer", "tokenizer_2"), strict=True))
"""The tokenizer's folder of each text encoder."""


def components_of(folder: Path) -> dict[str, str]:
    """:data:`COMPONENTS` of a model folder, and the second text encoder where it has one.

    Raises:
      CatVersionError: its ``model_index.json`` cannot be used.
    """
    second = component_class(read_model_index(folder), TEXT_ENCODERS[1]) is not None
    return COMPONENTS | (SECOND_TEXT_ENCODER if second else {})


def without_variant(folder: Path, variant: str | None) -> list[str]:
    """The components that lack ``variant`` where another one has it; none where no component has
    it, which is a slip.
    """
    if variant is None:
        return []
    components = components_of(folder)
    lacking = [name for name in components if not _has(folder / name, weights_of(variant))]
    return [] if len(lacking) == len(components) else lacking


def component_variants(folder: Path, variant: str | None) -> dict[str, str | None]:
    """The variant to read of each component; that a component falls back is logged."""
    plain = [
        name for name in without_variant(folder, variant) if _has(folder / name, weights_of(None))
    ]
    if plain:
        logger.warning(
            "%s: %s has no weights of variant %r; its plain ones are used",
            folder,
            " and ".join(plain),
            variant,
        )
    return {name: None if name in plain else variant for name in components_of(folder)}


def weights_of(variant: str | None) -> set[str]:
    """Every name that a file with the weights of ``variant`` may have."""
    return {file for stem in STEMS for file in weight_files(stem, variant)}


def _has(folder: Path, files: Iterable[str]) -> bool:
    return any((folder / file).is_file() for file in files)
