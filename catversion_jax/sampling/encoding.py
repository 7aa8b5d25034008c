"""Prompts to text states, with the concepts that act on them.

Every prompt is encoded alone, in a program of one row, so that its states do not depend on what
else is drawn.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.learned import LearnedPart
from catversion_jax.models.clip.adaptation import HIDDEN
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import text_states
from catversion_jax.models.unet.embeddings import AddedConditions
from catversion_jax.models.weights.network import Network
from catversion_jax.sampling.requests import (
    ConceptUse,
    ImageRequest,
    active_concepts,
    learned_parts,
    place_concepts,
)

Conditions = tuple[Float[Array, "B T D"], AddedConditions | None]
"""The prompts' context, and what Stable Diffusion XL is told beside it."""


def encode_text(backbone: Backbone, prompt: str, concepts: Sequence[ConceptUse]) -> TextStates:
    """One prompt's row of everything that the UNet is told of it, with the concepts that act on
    it, on the host: context ``[T D]`` and, in Stable Diffusion XL, pooled ``[P]``. Encoded alone,
    so nothing else matters.

    Whether a concept acts is asked of the first tokenizer; where its word stands, of each.

    Raises:
      CatVersionError: a concept of a model with another number of text encoders.
    """
    acting = active_concepts(backbone.tokenizers[0], prompt, concepts)
    placed = [place_concepts(tokenizer, prompt, acting) for tokenizer in backbone.tokenizers]
    apart = (placed[0].word_places == HIDDEN).any(axis=1)  # [U]
    parts = [
        learned_parts(backbone, use, bounded=bool(bounded))
        for use, bounded in zip(acting, apart, strict=True)
    ]
    token_ids, word_places = jax.device_put(
        (
            tuple(one.token_ids[None] for one in placed),
            tuple(one.word_places[:, None] for one in placed),
        )
    )
    learned = tuple(
        tuple(_with_argument(of_use[index]) for of_use in parts) for index in range(len(placed))
    )
    learned = jax.device_put(learned)
    states = jax.device_get(_encode(backbone.text_encoders, token_ids, learned, word_places))
    return jax.tree.map(lambda rows: np.asarray(rows)[0], states)


def encode_prompt(
    backbone: Backbone, prompt: str, concepts: Sequence[ConceptUse]
) -> Float[np.ndarray, "T D"]:
    """The context of :func:`encode_text`, for models whose UNet is told nothing else.

    Raises:
      CatVersionError: the model has two text encoders, and so more than these states.
    """
    states = encode_text(backbone, prompt, concepts)
    if states.pooled is not None:
        raise CatVersionError(
            f"{backbone.name}: has {len(backbone.text_encoders)} text encoders (Stable Diffusion "
            "XL), and its UNet needs a pooled state too, which this does not give. Use encode_text."
        )
    return np.asarray(states.context)


class KnownTexts:
    """Encodes prompts of one model and keeps the states of the last ones, since many come again:
    negative prompts above all.

    Args:
      most: how many are kept; None keeps all.
    """

    def __init__(self, most: int | None = None):
        self._most = most
        # with the concepts, so that no other gets the id of one of them
        self._known: collections.OrderedDict[
            tuple[object, ...], tuple[TextStates, tuple[ConceptUse, ...]]
        ] = collections.OrderedDict()

    def encoded(
        self, backbone: Backbone, prompt: str, concepts: tuple[ConceptUse, ...]
    ) -> TextStates:
        """As :func:`encode_text`."""
        key = (
            prompt,
            *(
                (id(use.learned), use.scale, use.when, use.class_words, use.keep_apart)
                for use in concepts
            ),
        )
        if key not in self._known:
            self._known[key] = encode_text(backbone, prompt, concepts), concepts
        self._known.move_to_end(key)
        if self._most is not None and len(self._known) > self._most:
            self._known.popitem(last=False)
        return self._known[key][0]


def encode_requests(
    backbone: Backbone,
    requests: Sequence[ImageRequest],
    guidance_scale: float,
    known: KnownTexts | None = None,
) -> list[list[TextStates]]:
    """Text states of every prompt and, where guidance needs them, of every negative prompt.

    ``known`` has those of earlier calls with this model; by default nothing is known.
    """
    known = known or KnownTexts()
    prompted = [known.encoded(backbone, one.prompt, one.concepts) for one in requests]
    if guidance_scale <= 1:
        return [prompted]
    plain = [
        jax.tree.map(np.zeros_like, states)
        if backbone.zeros_for_empty_prompt and not request.negative_prompt
        else known.encoded(backbone, request.negative_prompt, ())
        for request, states in zip(requests, prompted, strict=True)
    ]
    return [prompted, plain]


def conditions(states: TextStates, height: int, width: int) -> Conditions:
    """What the UNet is told of one image of so many pixels; without a pooled state nothing beside
    the context.

    The picture counts as one of this size that was not cropped, as in diffusers' pipeline.
    """
    if states.pooled is None:
        return states.context, None
    time_ids: Any = np.array([height, width, 0, 0, height, width], np.float32)
    return states.context, AddedConditions(states.pooled, time_ids)


def stack_conditions(rows: Sequence[Conditions]) -> Conditions:
    """A batch of single images' conditions."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


_Scaled = tuple[LearnedPart, Float[np.ndarray, " n"] | None]
"""What a concept learned, and its strength, on which no program depends."""


def _with_argument(part: LearnedPart) -> _Scaled:
    strength = part.strength
    if strength is None:
        return part, None
    return part.with_strength([0.0] * len(strength)), np.asarray(strength, np.float32)


@jax.jit
def _encode(
    text_encoders: tuple[Network, ...],
    token_ids: tuple[Int[Array, "B T"], ...],
    learned: tuple[tuple[_Scaled, ...], ...],
    word_places: tuple[Int[Array, "U B T"], ...],
) -> TextStates:
    """The states in float32; the last three arguments are for each encoder."""
    places = [list(of_one) for of_one in word_places]
    uses = tuple(
        tuple(
            part if strength is None else part.with_strength(cast(Any, strength))
            for part, strength in of_encoder
        )
        for of_encoder in learned
    )
    states = text_states(text_encoders, token_ids, uses, places)
    return jax.tree.map(lambda array: array.astype(jnp.float32), states)
