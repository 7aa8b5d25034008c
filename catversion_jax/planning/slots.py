"""``concepts_per_device=auto``: as many slots as the memory of the devices at hand holds."""

from __future__ import annotations

import logging

from jax.sharding import Mesh

from catversion_jax.config import TrainConfig
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.planning.compiled import compile_step
from catversion_jax.planning.estimate import USABLE_MEMORY, MemoryModel
from catversion_jax.sharding import CONCEPT_AXIS

logger = logging.getLogger(__name__)

WITHOUT_LIMIT = 4
"""Slots where the device names no limit of its memory, as CPUs do."""


def slots_per_device(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    *,
    num_concepts: int,
    max_images: int,
    max_prompts: int,
) -> int:
    """Slots on each device: what the option says, or what fits; never more than can be filled.

    Raises:
      CatVersionError: not even one fits.
    """
    enough = max(1, -(-num_concepts // mesh.shape[CONCEPT_AXIS]))
    if config.concepts_per_device != "auto":
        return min(config.concepts_per_device, enough)
    memory = device_memory(mesh)
    if memory is None:
        return min(WITHOUT_LIMIT, enough)
    fit = largest_slots(config, backbone, mesh, USABLE_MEMORY * memory, max_images, max_prompts)
    if fit < 1:
        raise CatVersionError(
            f"concepts_per_device=auto: not one concept fits the {memory / 1e9:.1f} GB of a "
            "device. Try a smaller resolution or train_batch_size, or mixed_precision=bf16."
        )
    logger.info("concepts_per_device=auto: %d fit, %d are used", fit, min(fit, enough))
    return min(fit, enough)


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a program can have on each device; None where the device does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.devices.flat]
    return min(limits) or None


def largest_slots(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    memory_bytes: float,
    max_images: int,
    max_prompts: int = 1,
) -> int:
    """Slots of the training step that fit: a line through the compiler's memory of one and of two.

    Raises:
      CatVersionError: the step does not compile.
    """
    one, two = (
        compile_step(backbone, config, mesh, slots, max_images, max_prompts) for slots in (1, 2)
    )
    return MemoryModel.of(one, two).largest(memory_bytes)
