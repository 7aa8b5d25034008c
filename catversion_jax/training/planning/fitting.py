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
from catversion_jax.config import DataOptions, DeviceOptions, MethodOptions
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.models.layers.recompute import Recompute
from catversion_jax.runtime.sharding import CONCEPT_AXIS
from catversion_jax.training.planning.abstract import PlannedStep
from catversion_jax.training.planning.compiled import (
    CompiledStep,
    DoesNotFitError,
    compile_step,
)
from catversion_jax.training.planning.estimate import USABLE_MEMORY, MemoryModel

logger = logging.getLogger(__name__)

USEFUL_ROWS = 4
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
      recompute: the ``gradient_checkpointing`` that was chosen.
      memory: by number of rows.
      step: of some rows, as it was compiled.
      largest: number of rows that fit.
      seconds: of all compilations.
    """

    recompute: Recompute
    memory: MemoryModel
    step: CompiledStep
    largest: int
    seconds: float


def fitted(
    planned: PlannedStep,
    mesh: Mesh,
    num_concepts: int,
    max_images: int,
    max_prompts: int,
    memory_bytes: float | None = None,
) -> DeviceOptions:
    """The device options of ``planned`` without ``auto``.

    Args:
      planned: the step; what its options say instead of ``auto`` stays.
      mesh: of this process.
      num_concepts: number of concepts to train; no more rows are taken than they fill.
      max_images: images of the largest concept.
      max_prompts: training prompts of the one with most of them.
      memory_bytes: of each device; by default what the devices say.

    Raises:
      CatVersionError: not one concept fits, or not as many as ``concepts_per_device`` says.
    """
    devices = planned.devices
    memory_bytes = memory_bytes or device_memory(mesh)
    if memory_bytes is None:
        return dataclasses.replace(
            devices,
            concepts_per_device=usual_rows(devices),
            gradient_checkpointing=_policies(devices)[0],
        )
    needed = max(1, -(-num_concepts // mesh.shape[CONCEPT_AXIS]))
    if devices.concepts_per_device != "auto":
        if devices.gradient_checkpointing != "auto":
            return devices  # everything was asked for
        rows = min(devices.concepts_per_device, needed)
        recompute = _least_recomputation(planned, mesh, rows, memory_bytes, max_images, max_prompts)
        return dataclasses.replace(devices, gradient_checkpointing=recompute)
    enough = min(USEFUL_ROWS, needed)
    fit = find_fit(planned, mesh, memory_bytes, enough, needed, max_images, max_prompts)
    if fit.largest < 1:
        raise CatVersionError(
            f"concepts_per_device=auto: not one concept fits the {memory_bytes / 1e9:.1f} GB of a "
            "device. Try a smaller resolution or train_batch_size, or mixed_precision=bf16."
        )
    used = min(fit.largest, needed)
    if used < needed and mesh.devices.flat[0].platform == "tpu":
        used = whole_tiles(used, images_per_row(planned))
    recompute = fit.recompute
    logger.info(
        "concepts_per_device=auto: %d fit with gradient_checkpointing=%s, %d are used",
        fit.largest,
        recompute,
        used,
    )
    return dataclasses.replace(devices, concepts_per_device=used, gradient_checkpointing=recompute)


def largest_concept(
    specs: Sequence[ConceptSpec], data: DataOptions, method: MethodOptions
) -> tuple[int, int]:
    """Images of the concept with most images, and prompts of the one with most prompts."""
    images = max((len(spec.images) for spec in specs), default=1)
    prompts = max((_num_prompts(spec, data, method) for spec in specs), default=1)
    return images, prompts


def usual_rows(devices: DeviceOptions) -> int:
    """``concepts_per_device``, and a useful number for ``auto``, whatever the memory."""
    asked = devices.concepts_per_device
    return USEFUL_ROWS if asked == "auto" else asked


def images_per_row(planned: PlannedStep) -> int:
    """Images of one concept that one device sees in a step."""
    return planned.objective.train_batch_size // planned.devices.data_parallel


def whole_tiles(largest: int, images: int) -> int:
    """The most rows, at most ``largest``, of ``images`` each that fill a TPU's tiles.

    ``largest`` where no number of rows does.
    """
    step = TILE_ROWS // math.gcd(TILE_ROWS, images)
    return largest // step * step or largest


def find_fit(
    planned: PlannedStep,
    mesh: Mesh,
    memory_bytes: float,
    enough: int,
    most: int,
    max_images: int,
    max_prompts: int = 1,
    *,
    fast: bool = True,
) -> Fit:
    """The least recomputation with which ``enough`` rows fit, or the one with which most do.

    The memory is a line through what the compiler says of one row and of some; then through the
    latter and as many as fit by that line, but not more than ``most``: a few images are laid out
    otherwise than many, and the first line may promise a tenth too much.

    Raises:
      DoesNotFitError: not one concept fits, whatever is computed again.
      CatVersionError: the step does not compile for another reason than memory.
    """
    usable = USABLE_MEMORY * memory_bytes

    def compiled(recompute: Recompute, rows: int) -> CompiledStep:
        tried = _with_recompute(planned, recompute)
        return compile_step(tried, mesh, rows, max_images, max_prompts, fast=fast)

    seconds, best, problem = 0.0, None, None
    for recompute in _policies(planned.devices):
        try:
            one = compiled(recompute, 1)
            some = compiled(recompute, max(2, min(enough, USEFUL_ROWS)))
        except DoesNotFitError as error:
            problem = error
            continue
        seconds += one.seconds + some.seconds
        memory = MemoryModel.of(one, some)
        largest = memory.largest(usable)
        if best is None or largest > best.largest:
            best = Fit(recompute, memory, some, largest, seconds)
        if largest >= enough:
            break
    if best is None:
        assert problem is not None
        raise problem
    near, rows = best.step, min(best.largest, most)
    if rows <= near.rows:
        return dataclasses.replace(best, seconds=seconds)
    try:
        far = compiled(best.recompute, rows)
    except DoesNotFitError:  # go by what is known to fit
        return dataclasses.replace(best, largest=near.rows, seconds=seconds)
    memory = MemoryModel.of(near, far)
    return dataclasses.replace(
        best, memory=memory, largest=memory.largest(usable), seconds=seconds + far.seconds
    )


def _least_recomputation(
    planned: PlannedStep,
    mesh: Mesh,
    rows: int,
    memory_bytes: float,
    max_images: int,
    max_prompts: int,
) -> Recompute:
    """Compiles what will be trained, so that training finds it in the compilation cache."""
    problem: CatVersionError | None = None
    for recompute in _policies(planned.devices):
        tried = _with_recompute(planned, recompute)
        try:
            step = compile_step(tried, mesh, rows, max_images, max_prompts, fast=False)
        except DoesNotFitError as error:
            problem = error
            continue
        if step.total_bytes <= USABLE_MEMORY * memory_bytes:
            logger.info("gradient_checkpointing=%s: %d concepts fit", recompute, rows)
            return recompute
        problem = CatVersionError(
            f"concepts_per_device={rows}: needs {step.total_bytes / 1e9:.1f} GB, a device has "
            f"{memory_bytes / 1e9:.1f}. Try concepts_per_device=auto."
        )
    assert problem is not None
    raise problem


def _policies(devices: DeviceOptions) -> tuple[Recompute, ...]:
    """What may be computed again, from the fastest to the smallest."""
    if devices.gradient_checkpointing == "auto":
        return ("none", "attention", "blocks")
    return (devices.gradient_checkpointing,)


def _with_recompute(planned: PlannedStep, recompute: Recompute) -> PlannedStep:
    devices = dataclasses.replace(planned.devices, gradient_checkpointing=recompute)
    return dataclasses.replace(planned, devices=devices)


def _num_prompts(spec: ConceptSpec, data: DataOptions, method: MethodOptions) -> int:
    try:
        return len(concept_prompts(spec, data.instance_prompt, default_when=method.when))
    except ConceptError:
        return 1  # training will give it up and say why


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a program can have on each device; None where the device does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.devices.flat]
    return min(limits) or None
