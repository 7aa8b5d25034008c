"""What is trained, and the cached data it is trained on. Every leaf leads with the concept axis C.

Randomness belongs to the concept: its key comes from its own seed, each step folds in the step
number and each place in the batch its index. Rows, company and devices never enter, so a concept's
result does not depend on them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.config import MethodOptions, OptimizerOptions
from catversion_jax.methods.learned import Learned, LearnedPart, named_arrays
from catversion_jax.methods.table import method_for
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.text_encoders import LowerStates

# Streams of one concept's key. Steps fold in their number under TRAIN_STREAM.
INIT_STREAM, TRAIN_STREAM, EVAL_STREAM, ORDER_STREAM, TIMESTEP_STREAM = 0, 1, 2, 3, 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The trained state of C concepts: the only thing a checkpoint holds.

    Attributes:
      step: ``[C]`` int32, updates done.
      learned: what is learned, leaves ``[C L P N H]`` or ``[C V D]`` float32.
      opt_state: optax state, one per concept.
      failed_step: ``[C]`` int32, the step whose loss or update was not finite, -1 while healthy. A
        failed concept keeps its last finite state and no longer changes.
      average: moving average of ``learned``, or None where it is not asked for.
    """

    step: Int[Array, "C"]
    learned: Learned
    opt_state: Any
    failed_step: Int[Array, "C"]
    average: Learned | None = None

    @property
    def exported(self) -> Learned:
        """What is evaluated, drawn with and written: the average where there is one."""
        return self.learned if self.average is None else self.average


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConceptData:
    """Everything the steps of C concepts read, cached on the device once.

    Attributes:
      rng: ``[C]`` PRNG keys from the concepts' seeds.
      latent_mean, latent_std: ``[C M 2 h w c]`` scaled VAE posterior; axis 2 is (as is, flipped).
      mask: ``[C M 2 h w]`` in 0..1, or None where the loss is not masked.
      num_images: ``[C]`` real entries of M.
      flip: ``[C]`` probability of the flipped latents.
      text: of each text encoder the training prompts ``[C K T D]``, entering the first adapted
        layer.
      num_prompts: ``[C]`` real entries of K.
      empty_text: ``[C T D]`` the same for the empty prompt, or None without caption dropout.
      time_ids: ``[C M 6]`` what Stable Diffusion XL is told of the images' sizes; None for models
        that are told nothing.
      kept: ``[C M V 2 h w 1+c]`` what an inpainting model reads beside the noisy latents, for V
        areas to be painted anew; None for other models.
      plain: ``[C K T D]`` what the plain model makes of the training prompts, or None where it is
        not preserved.
      empty_plain: ``[C T D]`` the same of the empty prompt, or None without caption dropout.
    """

    rng: Array
    latent_mean: Float[Array, "C M 2 h w c"]
    latent_std: Float[Array, "C M 2 h w c"]
    mask: Float[Array, "C M 2 h w"] | None
    num_images: Int[Array, "C"]
    flip: Float[Array, "C"]
    text: tuple[LowerStates, ...]
    num_prompts: Int[Array, "C"]
    empty_text: tuple[LowerStates, ...] | None
    time_ids: Float[Array, "C M 6"] | None = None
    kept: Float[Array, "C M V 2 h w k"] | None = None
    plain: TextStates | None = None
    empty_plain: TextStates | None = None


def make_optimizer(
    options: OptimizerOptions, method: MethodOptions
) -> optax.GradientTransformation:
    """AdamW for ONE concept (the step maps it over concepts, so a clip never couples them)."""
    warmup, total = options.lr_warmup_steps, options.max_train_steps
    decay_steps = max(1, total - warmup)
    after = {
        "constant": optax.constant_schedule(options.learning_rate),
        "linear": optax.linear_schedule(options.learning_rate, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(options.learning_rate, decay_steps),
    }[options.lr_scheduler]
    schedule = after
    if warmup:
        ramp = optax.linear_schedule(0.0, options.learning_rate, warmup)
        schedule = optax.join_schedules([ramp, after], [warmup])
    tx = optax.adamw(
        schedule,
        b1=options.adam_beta1,
        b2=options.adam_beta2,
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
    )
    if options.max_grad_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(options.max_grad_norm), tx)
    frozen = method_for(method).frozen_fields(method)
    if not frozen:
        return tx

    def labels(part: LearnedPart) -> Any:
        names: Any = {n: "frozen" if n in frozen else "trained" for n in named_arrays(part)}
        fields: Any = part  # every method is a dataclass
        return dataclasses.replace(fields, **names)

    return optax.partition(
        {"trained": tx, "frozen": optax.set_to_zero()},
        lambda learned: learned.with_parts(labels),
    )


def concept_key(seed: int) -> Array:
    """The PRNG key everything random about a concept derives from."""
    return jax.random.key(seed, impl="threefry2x32")


def create_train_state(
    learned: Learned, tx: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """Step-0 state of stacked concepts (leaves lead with C)."""
    num_concepts = jax.tree.leaves(learned)[0].shape[0]
    return TrainState(
        step=jnp.zeros(num_concepts, jnp.int32),
        learned=learned,
        opt_state=jax.vmap(tx.init)(learned),
        failed_step=jnp.full(num_concepts, -1, jnp.int32),
        average=learned if averaged else None,
    )
