"""Start values of what a concept learns, and their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.config import MethodOptions, OptimizerOptions
from catversion_jax.methods.learned import Learned
from catversion_jax.methods.start_values import StartingPoint
from catversion_jax.methods.table import start_learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import TextEncoderFacts, text_states
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
    text_encoders: Sequence[Network],
    text_facts: Sequence[TextEncoderFacts],
    token_ids: Sequence[np.ndarray],
    word_positions: Sequence[tuple[int, ...]],
    seed: int,
) -> Learned:
    """Start values of one concept, without a concept axis, float32.

    Args:
      method: what is learned, and how it starts.
      text_encoders: frozen encoders, whose own keys and values, or embeddings, ``class_word`` and
        ``bos`` copy.
      text_facts: their numbers of layers.
      token_ids: ``[T]`` a training prompt of the concept as each of them reads it.
      word_positions: where the base-class words stand in each of ``token_ids``.
      seed: the concept's seed; with ``init=predicted`` the concept encoder's.
    """
    points = []
    own = None
    if method.context_states:
        own = _own_output(tuple(text_encoders), [ids[None] for ids in token_ids])
    begins = np.cumsum([0, *(facts.num_heads * facts.head_dim for facts in text_facts)])
    for index, facts in enumerate(text_facts):
        at_word = method.init in ("class_word", "predicted")
        sources = word_positions[index] if at_word else (0,)
        copied = _in_turn(sources, method.num_positions)
        of_encoder = None
        if own is not None:
            states = _in_turn(sources, method.context_states)
            of_encoder = own[states, begins[index] : begins[index + 1]]
        rng = jax.random.fold_in(concept_key(seed), INIT_STREAM)
        points.append(
            StartingPoint(
                text_encoder=text_encoders[index],
                num_layers=facts.num_context_layers,
                num_reaching_layers=facts.num_reaching_layers,
                token_ids=token_ids[index],
                copied=copied,
                rng=rng if index == 0 else jax.random.fold_in(rng, index),
                own_states=of_encoder,
            )
        )
    return start_learned(method, points)


def _in_turn(sources: tuple[int, ...], count: int) -> np.ndarray:
    """Each of ``count`` learned things copies one of ``sources``, one after the other."""
    return np.array([sources[i % len(sources)] for i in range(count)])


@jax.jit
def _own_output(
    text_encoders: tuple[Network, ...], token_ids: Sequence[Int[Array, "1 T"]]
) -> Float[Array, "T D"]:
    """What the plain encoders give the UNet of one prompt, side by side."""
    return text_states(text_encoders, token_ids).context[0]


def abstract_learned(method: MethodOptions, backbone: Backbone) -> Learned:
    """What one concept learns, as shapes: leaves are ``jax.ShapeDtypeStruct``.

    Raises:
      CatVersionError: an option contradicts the method, or layers that this encoder does not have.
    """
    facts = backbone.text_facts
    token_ids = [np.zeros(backbone.context_length, np.int32)] * len(facts)

    def one(text_encoders: tuple[Network, ...]) -> Learned:
        return init_learned(method, text_encoders, facts, token_ids, [(0,)] * len(facts), 0)

    return jax.eval_shape(one, backbone.text_encoders)


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
