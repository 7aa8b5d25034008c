"""Training prompts in front of the layers that learn: checked, tokenized, and encoded up to there.

What lies below the first adapted layer of a text encoder does not depend on what is learned, so it
is computed once. Every prompt is encoded alone, so that its states depend on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from catversion_jax.concepts.foreign_syntax import foreign_syntax
from catversion_jax.errors import ConceptError
from catversion_jax.methods.learned import Learned, LearnedPart
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.clip.tokenizer import PlacedPrompt, Tokenizer
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import LowerStates, upper_text_states
from catversion_jax.models.weights.network import Network
from catversion_jax.training.run.records import ConceptRecord

logger = logging.getLogger(__name__)


def check_prompts_fit(record: ConceptRecord, backbone: Backbone) -> None:
    """Warn of training prompts that are cut off.

    Raises:
      ConceptError: the class word is cut off.
    """
    if foreign := foreign_syntax(record.prompts):
        logger.warning(f"{record.name}: {foreign}")
    for prompt, tokenizer in itertools.product(record.prompts, backbone.tokenizers):
        lost = tokenizer.cut_off(prompt)
        if not lost:
            continue
        if record.when == "class_word" and not tokenizer.contains(prompt, record.class_words):
            raise ConceptError(
                f"{record.name}: the base class {record.base_class!r} does not fit into the "
                f"model's context of {tokenizer.model_max_length} tokens: prompt {prompt!r} loses "
                f"{lost!r}. Use shorter words."
            )
        logger.warning(
            f"{record.name}: prompt {prompt!r} is longer than the model reads; cut off: {lost!r}"
        )


def lower_text(
    record: ConceptRecord, backbone: Backbone, learned: Learned, token_ids: Sequence[Any]
) -> tuple[tuple[LowerStates, ...], tuple[LowerStates, ...]]:
    """The training prompts in front of the first adapted layer of each encoder, with room for what
    is learned and without; each prompt is encoded alone.

    Raises:
      ConceptError: a prompt has no room for all learned vectors.
    """
    text, plain = list[LowerStates](), list[LowerStates]()
    for encoder, tokenizer, part, ids in zip(
        backbone.text_encoders, backbone.tokenizers, learned.parts, token_ids, strict=True
    ):
        lower = functools.partial(lower_text_states, encoder, layer=part.first_layer)
        placed = _place_prompts(record, tokenizer, part)
        places: Any = np.stack([one.word_places[0] for one in placed])
        hidden: Any = np.stack([lower(row) for row in ids])
        plain.append(LowerStates(hidden, ids, places))
        if part.num_word_places is None:
            text.append(plain[-1])
        else:  # the learned vectors' room moves the other tokens
            moved: Any = np.stack([one.token_ids for one in placed])
            moved_hidden: Any = np.stack([lower(row) for row in moved])
            text.append(LowerStates(moved_hidden, moved, places))
    return tuple(text), tuple(plain)


def empty_prompt(backbone: Backbone, learned: Learned) -> tuple[LowerStates, ...]:
    """The empty prompt ``[T D]`` in front of the first adapted layer of each encoder."""
    empty = []
    for encoder, tokenizer, part in zip(
        backbone.text_encoders, backbone.tokenizers, learned.parts, strict=True
    ):
        ids: Any = tokenizer([""])[0]
        hidden: Any = lower_text_states(encoder, ids, part.first_layer)
        empty.append(LowerStates(hidden, ids, np.full_like(ids, -1)))
    return tuple(empty)


def plain_states(backbone: Backbone, text: Sequence[LowerStates], learned: Learned) -> TextStates:
    """What the plain model makes of prompts ``[K T D]`` in front of the first adapted layer of each
    encoder; each is encoded alone.
    """
    layers = tuple(part.first_layer for part in learned.parts)
    alone = [
        jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], tuple(text))
        for row in range(len(text[0].token_ids))
    ]
    states = [_upper(backbone.text_encoders, one, layers) for one in alone]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *states)


@functools.partial(jax.jit, static_argnames="layers")
def _upper(
    text_encoders: tuple[Network, ...], text: tuple[LowerStates, ...], layers: tuple[int, ...]
) -> TextStates:
    unplaced = [dataclasses.replace(one, word_places=None) for one in text]
    return upper_text_states(text_encoders, unplaced, layers)


def lower_text_states(text_encoder: Network, token_ids: np.ndarray, layer: int) -> np.ndarray:
    """States ``[T D]`` of one prompt ``[T]`` entering ``layer``, encoded alone."""
    return np.asarray(_lower(text_encoder, token_ids[None], layer)[0])


@functools.partial(jax.jit, static_argnames="layer")
def _lower(text_encoder: Network, token_ids: jax.Array, layer: int) -> jax.Array:
    return text_encoder.call("lower", token_ids, layer)


def _place_prompts(
    record: ConceptRecord, tokenizer: Tokenizer, learned: LearnedPart
) -> list[PlacedPrompt]:
    """The training prompts with room for what is learned.

    Raises:
      ConceptError: a prompt has no room for all learned vectors.
    """
    placed = [
        tokenizer.place(prompt, [record.class_words], [learned.num_word_places])
        for prompt in record.prompts
    ]
    needed = learned.num_word_places or 0
    for prompt, one in zip(record.prompts, placed, strict=True):
        if one.word_places.max(initial=-1) + 1 < needed:
            raise ConceptError(
                f"{record.name}: prompt {prompt!r} has no room for {needed} vectors in the model's "
                f"context of {tokenizer.model_max_length} tokens. Use fewer "
                "(num_vectors) or a shorter prompt."
            )
    return placed
