"""Start values of what a concept learns: the one place of the trainer that knows the methods."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float
from catversion_jax.config import MethodOptions, OptimizerOptions
from catversion_jax.methods.learned import Learned
from catversion_jax.methods.residual import KVResidual, resolve_layers
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.weights.network import Network
from catversion_jax.training.state import (
    INIT_STREAM,
    TrainState,
    concept_key,
    create_train_state,
    make_optimizer,
)

SPREAD = 0.1
"""How far copied start values of several positions lie apart, in units of their own root mean
square. At a tenth of it positions were still equal within 2-3 % after 150 steps (P = 4, 5e-3)."""


def first_adapted_layer(method: MethodOptions, num_layers: int) -> int:
    """The encoder layer below which nothing depends on what is learned.

    Raises:
      CatVersionError: layers that this encoder does not have.
    """
    if method.method == "textual_inversion":
        return 0
    return resolve_layers(method.layers, num_layers)[0]


def init_learned(
    method: MethodOptions,
    text_encoder: Network,
    num_layers: int,
    token_ids: np.ndarray,
    word_positions: tuple[int, ...],
    seed: int,
) -> Learned:
    """Start values of one concept, leaves ``[L P N H]`` or ``[V D]`` float32.

    Args:
      method: what is learned, and how it starts.
      text_encoder: frozen encoder, whose own keys and values, or embeddings, ``class_word`` and
        ``bos`` copy.
      num_layers: of the encoder.
      token_ids: ``[T]`` a training prompt of the concept.
      word_positions: where the base-class words stand in ``token_ids``.
      seed: the concept's seed.
    """
    sources = word_positions if method.init == "class_word" else (0,)
    taken = np.array([sources[p % len(sources)] for p in range(method.num_positions)])
    rng = jax.random.fold_in(concept_key(seed), INIT_STREAM)
    if method.method == "textual_inversion":
        own = _own_embeddings(text_encoder, token_ids)[taken]
        return TokenEmbeddings(_start(method, own, rng))
    layers = resolve_layers(method.layers, num_layers)
    own_key, own_value = _own_keys_values(text_encoder, token_ids[None], layers)
    rng_key, rng_value = jax.random.split(rng)
    return KVResidual(
        key=_start(method, own_key[:, 0, taken], rng_key),
        value=_start(method, own_value[:, 0, taken], rng_value),
        layers=layers,
        logit_bias=method.logit_bias,
        scope=method.scope,
    )


def template_state(
    method: MethodOptions, optimizer: OptimizerOptions, backbone: Backbone
) -> TrainState:
    """A state of one row, shapes only: what is stored of a concept, apart from the numbers."""
    token_ids = backbone.tokenizer(["a"])[0]

    def one_row(text_encoder: Network) -> TrainState:
        learned = init_learned(
            method, text_encoder, backbone.num_text_layers, token_ids, (0,), seed=0
        )
        stacked = jax.tree.map(lambda leaf: leaf[None], learned)
        averaged = optimizer.ema_decay is not None
        return create_train_state(stacked, make_optimizer(optimizer, method), averaged=averaged)

    return jax.eval_shape(one_row, backbone.text_encoder)


def _start(method: MethodOptions, own: Array, rng: Array) -> Array:
    """One array of start values; ``own`` are the encoder's, with the positions copied."""
    noise = jax.random.normal(rng, own.shape, jnp.float32)
    if method.init == "normal":
        return method.init_std * noise
    own = own.astype(jnp.float32)
    start = jnp.zeros_like(own) if method.init == "zero" else own
    if method.num_positions == 1:
        return start
    # Equal positions get equal gradients and would stay equal for ever.
    return start + SPREAD * jnp.sqrt(jnp.mean(own**2)) * noise


@functools.partial(jax.jit, static_argnames="layers")
def _own_keys_values(
    text_encoder: Network, token_ids: Array, layers: tuple[int, ...]
) -> tuple[Array, Array]:
    return text_encoder.call("keys_values", token_ids, layers=layers)


@jax.jit
def _own_embeddings(text_encoder: Network, token_ids: Array) -> Float[Array, "T D"]:
    return text_encoder.call("token_embeddings", token_ids)
