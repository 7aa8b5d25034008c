"""The frozen networks of a run, on the devices of its mesh."""

from __future__ import annotations

import dataclasses
import logging

import jax
from jax.sharding import Mesh

from catversion_jax.config import ModelOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone, default_dtype, load_backbone
from catversion_jax.runtime.sharding import replicated

logger = logging.getLogger(__name__)


def load(model: ModelOptions, mixed_precision: str, mesh: Mesh) -> Backbone:
    """The frozen networks that the options name, on every device of ``mesh``."""
    dtype = {"auto": default_dtype(), "bf16": "bfloat16", "no": "float32"}[mixed_precision]
    devices = jax.local_devices()
    if jax.process_count() > 1:
        logger.info("process %d of %d", jax.process_index(), jax.process_count())
    logger.info("%d device(s) of kind %s, %s", len(devices), devices[0].device_kind, dtype)
    logger.info("loading %s", model.pretrained_model_name_or_path)
    return load_backbone(
        model.pretrained_model_name_or_path,
        revision=model.revision,
        variant=model.variant,
        prediction_type=model.prediction_type,
        dtype=dtype,
        sharding=replicated(mesh),
    )


def placed(backbone: Backbone, mixed_precision: str, mesh: Mesh) -> Backbone:
    """Networks that are loaded already, on every device of ``mesh``.

    Raises:
      CatVersionError: their numbers are not those that are asked for.
    """
    given = backbone.dtype
    wanted = {"auto": given, "bf16": "bfloat16", "no": "float32"}[mixed_precision]
    if given != wanted:
        raise CatVersionError(
            f"mixed_precision={mixed_precision!r}: the backbone that was given holds "
            f"{given}. Load it with dtype={wanted!r}, or leave mixed_precision='auto'."
        )
    networks = {
        name: jax.device_put(getattr(backbone, name), replicated(mesh))
        for name in ("text_encoders", "unet", "vae")
    }
    return dataclasses.replace(backbone, **networks)
