"""What ``auto`` means on the devices at hand: ``concepts_per_device`` and
``gradient_checkpointing``.

Recomputing costs time (``docs/results/performance.md``), and beyond a few concepts a larger pack is
no faster. So as little is computed again as lets a useful number of concepts fit, and then as many
are taken as fit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from catversion_jax.concepts import ConceptSpec, concept_prompts
from catversion_jax.config import TrainConfig
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.models.layers.recompute import Recompute
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.sharding import CONCEPT_AXIS
from catversion_jax.training.planning.compiled import (
    CompiledStep,
    DoesNotFitError,
    compile_step,
)
from catversion_jax.training.planning.estimate import USABLE_MEMORY, MemoryModel

logger = logging.getLogger(__name__)

USEFUL_SLOTS = 4
"""Concepts on a device beyond which packing more saves hardly any time; also what is taken where
the device names no limit of its memory, as CPUs do.
"""

TILE_ROWS = 8
"""Images that fill a TPU's tiles. A batch of a multiple of it moves up to a seventh less memory per
image than others (docs/results/performance.md).
"""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a training fits a device.

    Attributes:
      config: with the ``gradient_checkpointing`` that was chosen.
      memory: by number of slots.
      step: of some slots, as it was compiled.
      largest: slots that fit.
      seconds: of all compilations.
    """

    config: TrainConfig
    memory: MemoryModel
    step: CompiledStep
    largest: int
    seconds: float


def fitted(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    specs: Sequence[ConceptSpec],
    memory_bytes: float | None = None,
) -> TrainConfig:
    """``config`` without ``auto``.

    Args:
      config: its numbers and names stay what they are.
      backbone: the frozen networks.
      mesh: of this process.
      specs: the concepts; no more slots are taken than they fill.
      memory_bytes: of each device; by default what the devices say.

    Raises:
      CatVersionError: not one concept fits, or not as many as ``concepts_per_device`` says.
    """
    memory_bytes = memory_bytes or device_memory(mesh)
    if memory_bytes is None:
        return dataclasses.replace(
            config,
            concepts_per_device=usual_slots(config),
            gradient_checkpointing=_policies(config)[0],
        )
    images = max((len(spec.images) for spec in specs), default=1)
    prompts = max((_num_prompts(spec, config) for spec in specs), default=1)
    needed = max(1, -(-len(specs) // mesh.shape[CONCEPT_AXIS]))
    if config.concepts_per_device != "auto":
        if config.gradient_checkpointing != "auto":
            return config  # everything was asked for
        slots = min(config.concepts_per_device, needed)
        return _least_recomputation(config, backbone, mesh, slots, memory_bytes, images, prompts)
    enough = min(USEFUL_SLOTS, needed)
    fit = find_fit(config, backbone, mesh, memory_bytes, enough, needed, images, prompts)
    if fit.largest < 1:
        raise CatVersionError(
            f"concepts_per_device=auto: not one concept fits the {memory_bytes / 1e9:.1f} GB of a "
            "device. Try a smaller resolution or train_batch_size, or mixed_precision=bf16."
        )
    used = min(fit.largest, needed)
    if used < needed and mesh.devices.flat[0].platform == "tpu":
        used = whole_tiles(used, config)
    recompute = fit.config.gradient_checkpointing
    logger.info(
        "concepts_per_device=auto: %d fit with gradient_checkpointing=%s, %d are used",
        fit.largest,
        recompute,
        used,
    )
    return dataclasses.replace(config, concepts_per_device=used, gradient_checkpointing=recompute)


def usual_slots(config: TrainConfig) -> int:
    """``concepts_per_device``, and a useful number for ``auto``, whatever the memory."""
    asked = config.concepts_per_device
    return USEFUL_SLOTS if asked == "auto" else asked


def whole_tiles(largest: int, config: TrainConfig) -> int:
    """The most slots, at most ``largest``, whose images fill a TPU's tiles; ``largest`` if none."""
    images = config.train_batch_size // config.data_parallel
    step = TILE_ROWS // math.gcd(TILE_ROWS, images)
    return largest // step * step or largest


def find_fit(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    memory_bytes: float,
    enough: int,
    most: int,
    max_images: int,
    max_prompts: int = 1,
    *,
    fast: bool = True,
) -> Fit:
    """The least recomputation with which ``enough`` slots fit, or the one with which most do.

    The memory is a line through what the compiler says of one slot and of some; then through the
    latter and as many as fit by that line, but not more than ``most``: a few images are laid out
    otherwise than many, and the first line may promise a tenth too much.

    Raises:
      DoesNotFitError: not one concept fits, whatever is computed again.
      CatVersionError: the step does not compile for another reason than memory.
    """
    usable = USABLE_MEMORY * memory_bytes

    def compiled(tried: TrainConfig, slots: int) -> CompiledStep:
        return compile_step(backbone, tried, mesh, slots, max_images, max_prompts, fast=fast)

    seconds, best, problem = 0.0, None, None
    for recompute in _policies(config):
        tried = dataclasses.replace(config, gradient_checkpointing=recompute)
        try:
            one = compiled(tried, 1)
            some = compiled(tried, max(2, min(enough, USEFUL_SLOTS)))
        except DoesNotFitError as error:
            problem = error
            continue
        seconds += one.seconds + some.seconds
        memory = MemoryModel.of(one, some)
        largest = memory.largest(usable)
        if best is None or largest > best.largest:
            best = Fit(tried, memory, some, largest, seconds)
        if largest >= enough:
            break
    if best is None:
        assert problem is not None
        raise problem
    near, slots = best.step, min(best.largest, most)
    if slots <= near.slots_per_chip:
        return dataclasses.replace(best, seconds=seconds)
    try:
        far = compiled(best.config, slots)
    except DoesNotFitError:  # go by what is known to fit
        return dataclasses.replace(best, largest=near.slots_per_chip, seconds=seconds)
    memory = MemoryModel.of(near, far)
    return dataclasses.replace(
        best, memory=memory, largest=memory.largest(usable), seconds=seconds + far.seconds
    )


def _least_recomputation(
    config: TrainConfig,
    backbone: Backbone,
    mesh: Mesh,
    slots: int,
    memory_bytes: float,
    images: int,
    prompts: int,
) -> TrainConfig:
    """Compiles what will be trained, so that training finds it in the compilation cache."""
    problem: CatVersionError | None = None
    for recompute in _policies(config):
        tried = dataclasses.replace(config, gradient_checkpointing=recompute)
        try:
            step = compile_step(backbone, tried, mesh, slots, images, prompts, fast=False)
        except DoesNotFitError as error:
            problem = error
            continue
        if step.total_bytes <= USABLE_MEMORY * memory_bytes:
            logger.info("gradient_checkpointing=%s: %d concepts fit", recompute, slots)
            return tried
        problem = CatVersionError(
            f"concepts_per_device={slots}: needs {step.total_bytes / 1e9:.1f} GB, a device has "
            f"{memory_bytes / 1e9:.1f}. Try concepts_per_device=auto."
        )
    assert problem is not None
    raise problem


def _policies(config: TrainConfig) -> tuple[Recompute, ...]:
    """From the fastest to the smallest."""
    if config.gradient_checkpointing == "auto":
        return ("none", "attention", "blocks")
    return (config.gradient_checkpointing,)


def _num_prompts(spec: ConceptSpec, config: TrainConfig) -> int:
    try:
        return len(concept_prompts(spec, config.instance_prompt, default_when=config.when))
    except ConceptError:
        return 1  # training will give it up and say why


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a program can have on each device; None where the device does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.devices.flat]
    return min(limits) or None
