"""Start values of what a concept learns, and their shapes."""

from __future__ import annotations

import jax
import numpy as np

from catversion_jax.config import MethodOptions, OptimizerOptions
from catversion_jax.methods.learned import Learned
from catversion_jax.methods.start_values import StartingPoint
from catversion_jax.methods.table import method_for
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.weights.network import Network
from catversion_jax.training.state import (
    INIT_STREAM,
    TrainState,
    concept_key,
    create_train_state,
    make_optimizer,
)


def init_learned(
    method: MethodOptions,
    text_encoder: Network,
    num_layers: int,
    token_ids: np.ndarray,
    word_positions: tuple[int, ...],
    seed: int,
) -> Learned:
    """Start values of one concept, without a concept axis, float32.

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
    copied = np.array([sources[p % len(sources)] for p in range(method.num_positions)])
    rng = jax.random.fold_in(concept_key(seed), INIT_STREAM)
    at = StartingPoint(text_encoder, num_layers, token_ids, copied, rng)
    return method_for(method).start(method, at)


def abstract_learned(method: MethodOptions, backbone: Backbone) -> Learned:
    """What one concept learns, as shapes: leaves are ``jax.ShapeDtypeStruct``.

    Raises:
      CatVersionError: an option contradicts the method, or layers that this encoder does not have.
    """
    token_ids = np.zeros(backbone.tokenizer.model_max_length, np.int32)

    def one(text_encoder: Network) -> Learned:
        return init_learned(method, text_encoder, backbone.num_text_layers, token_ids, (0,), 0)

    return jax.eval_shape(one, backbone.text_encoder)


def abstract_state(
    method: MethodOptions, optimizer: OptimizerOptions, backbone: Backbone, num_rows: int = 1
) -> TrainState:
    """The state of ``num_rows`` concepts, as shapes."""

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows, *leaf.shape), leaf.dtype)

    def create(learned: Learned) -> TrainState:
        averaged = optimizer.ema_decay is not None
        return create_train_state(learned, make_optimizer(optimizer, method), averaged=averaged)

    return jax.eval_shape(create, jax.tree.map(stacked, abstract_learned(method, backbone)))
