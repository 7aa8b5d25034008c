"""Prompts to text states, with the concepts that act on them.

Every prompt is encoded alone, in a program of one row, so that its states do not depend on what
else is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.methods.learned import Learned
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.weights.network import Network
from catversion_jax.sampling.requests import (
    ConceptUse,
    ImageRequest,
    active_concepts,
    place_concepts,
)


def encode_prompt(
    backbone: Backbone, prompt: str, concepts: Sequence[ConceptUse]
) -> Float[np.ndarray, "T D"]:
    """One prompt's text states with the concepts that act on it; encoded alone, so nothing else
    matters.
    """
    acting = active_concepts(backbone.tokenizer, prompt, concepts)
    learned = tuple(jax.device_put(use.learned.scaled(use.scale)) for use in acting)
    placed = place_concepts(backbone.tokenizer, prompt, acting)
    token_ids, word_places = jax.device_put((placed.token_ids[None], placed.word_places[:, None]))
    states = _encode(backbone.text_encoder, token_ids, learned, word_places)
    return np.asarray(jax.device_get(states))[0]


def encode_requests(
    backbone: Backbone, requests: Sequence[ImageRequest], guidance_scale: float
) -> list[list[np.ndarray]]:
    """Text states of every prompt and, where guidance needs them, of every negative prompt."""
    known: dict[tuple[object, ...], np.ndarray] = {}

    def encoded(prompt: str, concepts: tuple[ConceptUse, ...]) -> np.ndarray:
        key = (
            prompt,
            *((id(use.learned), use.scale, use.when, use.class_words) for use in concepts),
        )
        if key not in known:
            known[key] = encode_prompt(backbone, prompt, concepts)
        return known[key]

    prompted = [encoded(request.prompt, request.concepts) for request in requests]
    if guidance_scale <= 1:
        return [prompted]
    return [prompted, [encoded(request.negative_prompt, ()) for request in requests]]


@jax.jit
def _encode(
    text_encoder: Network,
    token_ids: Int[Array, "B T"],
    learned: tuple[Learned, ...],
    word_places: Int[Array, "U B T"],
) -> Float[Array, "B T D"]:
    return text_encoder(token_ids, learned, list(word_places)).astype(jnp.float32)
