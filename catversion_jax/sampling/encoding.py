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
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.learned import Learned
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import text_states
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

    Raises:
      CatVersionError: the model has two text encoders, and so more than these states.
    """
    acting = active_concepts(backbone.tokenizer, prompt, concepts)
    learned = tuple(jax.device_put(use.learned.scaled(use.scale)) for use in acting)
    placed = place_concepts(backbone.tokenizer, prompt, acting)
    token_ids, word_places = jax.device_put((placed.token_ids[None], placed.word_places[:, None]))
    states = _encode(backbone.text_encoders, (token_ids,), (learned,), (word_places,))
    return np.asarray(jax.device_get(states.context))[0]


def encode_text(backbone: Backbone, prompt: str, concepts: Sequence[ConceptUse]) -> TextStates:
    """One prompt's row of everything that the UNet is told of it, on the host: context ``[T D]``
    and, in Stable Diffusion XL, pooled ``[P]``.

    Raises:
      CatVersionError: a concept, which knows one text encoder, and a model that has two.
    """
    if len(backbone.text_encoders) == 1:
        return TextStates(encode_prompt(backbone, prompt, concepts))
    if concepts:
        raise CatVersionError(
            f"concept {concepts[0].name!r}: knows one text encoder, but {backbone.name} has two: "
            "half of the prompt would stay plain. Draw it with the model it was trained with."
        )
    token_ids = tuple(
        jax.device_put(tokenizer.place(prompt).token_ids[None]) for tokenizer in backbone.tokenizers
    )
    nothing = ((),) * len(token_ids)
    states = jax.device_get(_encode(backbone.text_encoders, token_ids, nothing, nothing))
    return jax.tree.map(lambda rows: np.asarray(rows)[0], states)


def encode_requests(
    backbone: Backbone, requests: Sequence[ImageRequest], guidance_scale: float
) -> list[list[TextStates]]:
    """Text states of every prompt and, where guidance needs them, of every negative prompt."""
    known: dict[tuple[object, ...], TextStates] = {}

    def encoded(prompt: str, concepts: tuple[ConceptUse, ...]) -> TextStates:
        key = (
            prompt,
            *((id(use.learned), use.scale, use.when, use.class_words) for use in concepts),
        )
        if key not in known:
            known[key] = encode_text(backbone, prompt, concepts)
        return known[key]

    prompted = [encoded(request.prompt, request.concepts) for request in requests]
    if guidance_scale <= 1:
        return [prompted]
    plain = [
        jax.tree.map(np.zeros_like, states)
        if backbone.zeros_for_empty_prompt and not request.negative_prompt
        else encoded(request.negative_prompt, ())
        for request, states in zip(requests, prompted, strict=True)
    ]
    return [prompted, plain]


@jax.jit
def _encode(
    text_encoders: tuple[Network, ...],
    token_ids: tuple[Int[Array, "B T"], ...],
    learned: tuple[tuple[Learned, ...], ...],
    word_places: tuple[Int[Array, "U B T"] | tuple[()], ...],
) -> TextStates:
    """The states in float32; the last three arguments are for each encoder."""
    places = [list(of_one) for of_one in word_places]
    states = text_states(text_encoders, token_ids, learned, places)
    return jax.tree.map(lambda array: array.astype(jnp.float32), states)
