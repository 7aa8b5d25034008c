"""What is trained, and the cached data it is trained on. Every leaf leads with the concept axis C.

Randomness belongs to the concept: its key comes from its own seed, each step folds in the step
number and each image slot its index. Rows, packs and devices never enter, so a concept's result
does not depend on them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.config import TrainConfig
from catversion_jax.models.network import Network
from catversion_jax.residual import KVResidual

# Streams of one concept's key. Steps fold in their number under TRAIN_STREAM.
INIT_STREAM, TRAIN_STREAM, EVAL_STREAM, ORDER_STREAM = 0, 1, 2, 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The trained state of C concepts: the only thing a checkpoint holds.

    Attributes:
      step: ``[C]`` int32, updates done.
      residual: leaves ``[C L P N H]`` float32.
      opt_state: optax state, one per concept.
      failed_step: ``[C]`` int32, the step whose loss or update was not finite, -1 while healthy. A
        failed concept keeps its last finite state and no longer changes.
    """

    step: Int[Array, "C"]
    residual: KVResidual
    opt_state: Any
    failed_step: Int[Array, "C"]


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
      text_hidden: ``[C K T D]`` states entering the first adapted layer, one per training prompt.
      num_prompts: ``[C]`` real entries of K.
      empty_hidden: ``[C T D]`` the same for the empty prompt, or None without caption dropout.
    """

    rng: Array
    latent_mean: Float[Array, "C M 2 h w c"]
    latent_std: Float[Array, "C M 2 h w c"]
    mask: Float[Array, "C M 2 h w"] | None
    num_images: Int[Array, "C"]
    flip: Float[Array, "C"]
    text_hidden: Float[Array, "C K T D"]
    num_prompts: Int[Array, "C"]
    empty_hidden: Float[Array, "C T D"] | None


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW for ONE concept (the step maps it over concepts, so a clip never couples them)."""
    warmup, total = config.lr_warmup_steps, config.max_train_steps
    decay_steps = max(1, total - warmup)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay_steps),
    }[config.lr_scheduler]
    schedule = after
    if warmup:
        ramp = optax.linear_schedule(0.0, config.learning_rate, warmup)
        schedule = optax.join_schedules([ramp, after], [warmup])
    adamw = optax.adamw(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    if config.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def concept_key(seed: int) -> Array:
    """The PRNG key everything random about a concept derives from."""
    return jax.random.key(seed, impl="threefry2x32")


def init_residual(
    config: TrainConfig,
    layers: tuple[int, ...],
    text_encoder: Network,
    token_ids: np.ndarray,
    word_positions: tuple[int, ...],
    seed: int,
) -> KVResidual:
    """Start values of one concept's residual, ``[L P N H]`` float32.

    Args:
      config: ``init``, ``init_std``, ``num_positions``, ``logit_bias``.
      layers: adapted layers.
      text_encoder: frozen encoder, whose own keys and values ``class_word`` and ``bos`` copy.
      token_ids: ``[T]`` a training prompt of the concept.
      word_positions: where the base-class words stand in ``token_ids``.
      seed: the concept's seed.
    """
    own_key, own_value = _own_keys_values(text_encoder, token_ids[None], layers)
    shape = (len(layers), config.num_positions, *own_key.shape[-2:])
    rng_key, rng_value = jax.random.split(jax.random.fold_in(concept_key(seed), INIT_STREAM))
    noise_key = jax.random.normal(rng_key, shape, jnp.float32)
    noise_value = jax.random.normal(rng_value, shape, jnp.float32)
    if config.init == "normal":
        key, value = config.init_std * noise_key, config.init_std * noise_value
    elif config.init == "zero":
        key, value = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        positions = word_positions if config.init == "class_word" else (0,)
        taken = jnp.asarray([positions[p % len(positions)] for p in range(config.num_positions)])
        key = own_key[:, 0, taken].astype(jnp.float32)
        value = own_value[:, 0, taken].astype(jnp.float32)
    if config.init != "normal" and config.num_positions > 1:
        # Equal positions get equal gradients and would stay equal for ever.
        key, value = key + 0.01 * noise_key, value + 0.01 * noise_value
    return KVResidual(key=key, value=value, layers=layers, logit_bias=config.logit_bias)


@functools.partial(jax.jit, static_argnames="layers")
def _own_keys_values(
    text_encoder: Network, token_ids: Array, layers: tuple[int, ...]
) -> tuple[Array, Array]:
    return text_encoder.call("keys_values", token_ids, layers=layers)


def create_train_state(residual: KVResidual, tx: optax.GradientTransformation) -> TrainState:
    """Step-0 state of stacked residuals (leaves ``[C L P N H]``)."""
    num_concepts = residual.key.shape[0]
    return TrainState(
        step=jnp.zeros(num_concepts, jnp.int32),
        residual=residual,
        opt_state=jax.vmap(tx.init)(residual),
        failed_step=jnp.full(num_concepts, -1, jnp.int32),
    )
