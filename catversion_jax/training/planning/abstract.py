"""The arguments of the real training step as shapes: no weight is read, no array is made."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from catversion_jax.concepts.repainting import NUM_AREAS
from catversion_jax.config import (
    DeviceOptions,
    MethodOptions,
    ObjectiveOptions,
    OptimizerOptions,
)
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.models.unet.embeddings import NUM_TIME_IDS
from catversion_jax.runtime.sharding import by_concept, replicated
from catversion_jax.training.objective import prompted_states
from catversion_jax.training.start_values import abstract_state
from catversion_jax.training.state import ConceptData, TrainState, concept_key


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """The training step that is planned, apart from its devices and the number of its rows.

    Attributes:
      backbone: the frozen networks, or those of
        :func:`~catversion_jax.models.stable_diffusion.abstract_backbone`.
      resolution: side of the training images in pixels.
      method: what is learned.
      objective: the batch and its loss.
      optimizer: what is kept for each concept.
      devices: how the step is spread, dispatched and computed again.
    """

    backbone: Backbone
    resolution: int
    method: MethodOptions
    objective: ObjectiveOptions
    optimizer: OptimizerOptions
    devices: DeviceOptions


def abstract_arguments(
    planned: PlannedStep,
    mesh: Mesh,
    num_rows: int,
    max_images: int,
    max_prompts: int = 1,
) -> tuple[TrainState, ConceptData, Any, Any, jax.ShapeDtypeStruct]:
    """What :func:`~catversion_jax.training.step.make_train_step` takes, with shardings.

    Args:
      planned: the step.
      mesh: of the devices to compile for.
      num_rows: rows on all of them.
      max_images: images of the largest concept.
      max_prompts: training prompts of the one with most.
    """
    backbone = planned.backbone
    state = abstract_state(planned.method, planned.optimizer, backbone, num_rows)
    data = _abstract_data(planned, num_rows, max_images, max_prompts)
    rows, everywhere = by_concept(mesh), replicated(mesh)
    return (
        _placed(state, rows),
        _placed(data, rows),
        _placed(backbone.text_encoders, everywhere),
        _placed(backbone.unet, everywhere),
        _placed(jax.ShapeDtypeStruct((), jnp.int32), everywhere),
    )


def _abstract_data(
    planned: PlannedStep, num_rows: int, max_images: int, max_prompts: int
) -> ConceptData:
    backbone, objective = planned.backbone, planned.objective
    side = planned.resolution // backbone.latent_downsampling
    latents = _floats(num_rows, max_images, 2, side, side, backbone.latent_channels)
    integers: Any = jax.ShapeDtypeStruct((num_rows,), jnp.int32)

    def text(*prompts: int) -> tuple[LowerStates, ...]:
        shape = (num_rows, *prompts, backbone.context_length)
        tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
        states: list[Any] = [
            jax.ShapeDtypeStruct(
                (*shape, facts.num_heads * facts.head_dim), jax.tree.leaves(encoder)[0].dtype
            )
            for encoder, facts in zip(backbone.text_encoders, backbone.text_facts, strict=True)
        ]
        return tuple(LowerStates(hidden, tokens, tokens) for hidden in states)

    def plain(num_prompts: int) -> TextStates:
        states: TextStates = jax.eval_shape(
            functools.partial(prompted_states, None, first_layers=[0] * len(backbone.text_facts)),
            backbone.text_encoders,
            text(num_prompts),
        )
        return states

    def of_one_prompt(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((num_rows, *leaf.shape[2:]), leaf.dtype)

    preserves, drops = objective.preserves, objective.caption_dropout > 0
    return ConceptData(
        rng=jax.eval_shape(lambda: jnp.stack([concept_key(0)] * num_rows)),
        latent_mean=latents,
        latent_std=latents,
        mask=_floats(num_rows, max_images, 2, side, side) if objective.needs_masks else None,
        num_images=integers,
        flip=_floats(num_rows),
        text=text(max_prompts),
        num_prompts=integers,
        empty_text=text() if drops else None,
        time_ids=_floats(num_rows, max_images, NUM_TIME_IDS) if backbone.reads_time_ids else None,
        kept=_floats(num_rows, max_images, NUM_AREAS, 2, side, side, 1 + backbone.latent_channels)
        if backbone.inpaints
        else None,
        plain=plain(max_prompts) if preserves else None,
        empty_plain=jax.tree.map(of_one_prompt, plain(1)) if preserves and drops else None,
    )


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
