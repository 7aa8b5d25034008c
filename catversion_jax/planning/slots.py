"""``concepts_per_device=auto``: as many slots as the memory of the devices at hand holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jax.sharding import Mesh

from catversion_jax.concepts import ConceptSpec, concept_prompts
from catversion_jax.config import TrainConfig
from catversion_jax.errors import CatVersionError, ConceptError
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
    specs: Sequence[ConceptSpec],
) -> int:
    """The option ``concepts_per_device`` as a number: ``auto`` is what fits, but no more than
    ``specs`` fill.

    Raises:
      CatVersionError: not even one fits.
    """
    if config.concepts_per_device != "auto":
        return config.concepts_per_device
    memory = device_memory(mesh)
    if memory is None:
        return WITHOUT_LIMIT
    images = max((len(spec.images) for spec in specs), default=1)
    prompts = max((_num_prompts(spec, config) for spec in specs), default=1)
    fit = largest_slots(config, backbone, mesh, USABLE_MEMORY * memory, images, prompts)
    if fit < 1:
        raise CatVersionError(
            f"concepts_per_device=auto: not one concept fits the {memory / 1e9:.1f} GB of a "
            "device. Try a smaller resolution or train_batch_size, or mixed_precision=bf16."
        )
    used = min(fit, max(1, -(-len(specs) // mesh.shape[CONCEPT_AXIS])))
    logger.info("concepts_per_device=auto: %d fit, %d are used", fit, used)
    return used


def _num_prompts(spec: ConceptSpec, config: TrainConfig) -> int:
    try:
        return len(concept_prompts(spec, config.instance_prompt, default_when=config.when))
    except ConceptError:
        return 1  # training will give it up and say why


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
