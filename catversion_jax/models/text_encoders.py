"""The text encoders of a model: one in Stable Diffusion 1.x and 2.x, two in XL.

    (1)  one encoder:   context = last hidden state, normed
    (2)  two encoders:  context = [penultimate state of the first, penultimate state of the second],
                        pooled = projected end-of-text state of the second

What is learned may add states behind the output of an encoder, the same number behind each:

    (3)  context = [context; states of the first concept; states of the second; ...]

Both encoders of (2) read the same prompt, each through its own tokenizer, and their states stand
side by side. Source: diffusers ``StableDiffusionXLPipeline.encode_prompt``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.adaptation import Acting, AdaptationArgument, WordPlaces
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.clip.text_projection import (
    CLIPTextModelWithProjection,
    CLIPTextWithProjectionConfig,
    TextStates,
)
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.weights.fingerprint import NO_HASHES, EncoderHashes
from catversion_jax.models.weights.model_files import ModelFiles
from catversion_jax.models.weights.network import Network
from catversion_jax.models.weights.variants import TEXT_ENCODERS


@dataclasses.dataclass(frozen=True)
class TextEncoderFacts:
    """What a concept must fit.

    Attributes:
      num_layers: all of the encoder's.
      num_context_layers: those from the first on whose result reaches the context: all in (1), all
        but the last in (2).
      num_reaching_layers: those whose result reaches the UNet at all. The last layer of XL's second
        encoder is one more: it acts on the pooled state alone.
      num_heads: attention heads.
      head_dim: width of one head.
      hashes: of the weights.
    """

    num_layers: int
    num_context_layers: int
    num_reaching_layers: int
    num_heads: int
    head_dim: int
    hashes: EncoderHashes = NO_HASHES

    @property
    def sha256(self) -> str:
        """The fingerprint of the weights (``fingerprint.py``); ``""`` where none were read."""
        return self.hashes.sha256


@dataclasses.dataclass(frozen=True)
class TextEncoderFiles:
    """One text encoder of a model, before its weights are read.

    Attributes:
      name: of the component, ``text_encoder`` or ``text_encoder_2``.
      config: with a projection where it is the second one.
    """

    name: str
    config: CLIPTextConfig

    def module(self, weights: Any, rngs: nnx.Rngs) -> CLIPTextModel:
        """The network, in the precision ``weights``."""
        dtypes = {"dtype": weights, "param_dtype": weights, "rngs": rngs}
        if isinstance(self.config, CLIPTextWithProjectionConfig):
            return CLIPTextModelWithProjection(self.config, **dtypes)
        return CLIPTextModel(self.config, **dtypes)

    def facts(self, *, of_two: bool) -> TextEncoderFacts:
        """Its sizes; ``of_two`` where the model has a second encoder beside it."""
        config = self.config
        num_layers = config.num_hidden_layers
        gives_pooled = isinstance(config, CLIPTextWithProjectionConfig)
        return TextEncoderFacts(
            num_layers=num_layers,
            num_context_layers=num_layers - of_two,
            num_reaching_layers=num_layers if gives_pooled else num_layers - of_two,
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
        )


def read_text_encoders(files: ModelFiles) -> tuple[TextEncoderFiles, ...]:
    """The text encoders of a model, without their weights.

    Raises:
      CatVersionError: a configuration cannot be used.
    """
    kinds: dict[str, type[CLIPTextConfig]] = dict(
        zip(TEXT_ENCODERS, (CLIPTextConfig, CLIPTextWithProjectionConfig), strict=True)
    )
    return tuple(
        TextEncoderFiles(
            name, kinds[name].from_hf(files.config(name), source=files.config_source(name))
        )
        for name in files.text_encoders
    )


def read_tokenizers(
    files: ModelFiles, encoders: Sequence[TextEncoderFiles]
) -> tuple[Tokenizer, ...]:
    """The tokenizer of each encoder.

    Raises:
      CatVersionError: one cannot be read, or they make prompts of different lengths.
    """
    tokenizers = tuple(
        files.tokenizer(
            one.name,
            context=one.config.max_position_embeddings,
            vocab_size=one.config.vocab_size,
        )
        for one in encoders
    )
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if len(set(lengths)) > 1:
        raise CatVersionError(
            f"{files.path}: its tokenizers make prompts of {' and '.join(map(str, lengths))} "
            "tokens, must be equally many, since their states stand side by side. Download the "
            "model again."
        )
    return tokenizers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowerStates:
    """Prompts on their way through one text encoder; what is learned acts from here on.

    Attributes:
      hidden: ``[*B T D]``, the state that enters a layer.
      token_ids: ``[*B T]``, what was encoded.
      word_places: ``[*B T]`` where the class word stands, one for each of several concepts; None
        where what is learned need not know.
    """

    hidden: Float[Array, "*B T D"]
    token_ids: Int[Array, "*B T"]
    word_places: WordPlaces = None


def text_states(
    text_encoders: Sequence[Network],
    token_ids: Sequence[Int[Array, "B T"]],
    learned: Sequence[AdaptationArgument] | None = None,
    word_places: Sequence[WordPlaces] | None = None,
) -> TextStates:
    """What the prompts become, equation (1) or (2).

    Args:
      text_encoders: one or two networks.
      token_ids: ``[B T]`` for each, of its own tokenizer.
      learned: for each what acts on it; None is nothing.
      word_places: for each the places of the class words.

    Raises:
      CatVersionError: a concept that does not fit its encoder, or lacks its word's places.
    """
    places = word_places or [None] * len(text_encoders)
    lower = [
        LowerStates(encoder.call("lower", ids, 0), ids, where)
        for encoder, ids, where in zip(text_encoders, token_ids, places, strict=True)
    ]
    return upper_text_states(text_encoders, lower, [0] * len(lower), learned)


def upper_text_states(
    text_encoders: Sequence[Network],
    lower: Sequence[LowerStates],
    layers: Sequence[int],
    learned: Sequence[AdaptationArgument] | None = None,
) -> TextStates:
    """The same from the state on that enters one layer of each encoder.

    Args:
      text_encoders: one or two networks.
      lower: for each the prompts so far, ``[B T D]``.
      layers: for each the layer that ``lower`` enters.
      learned: for each what acts on it; None is nothing.

    Raises:
      CatVersionError: a concept that does not fit its encoder, acts below its layer, or lacks its
        word's places.
    """
    parts = learned or [None] * len(text_encoders)
    calls = [
        {"hidden": one.hidden, "learned": part, "layer": layer, "word_places": one.word_places}
        for one, part, layer in zip(lower, parts, layers, strict=True)
    ]
    if len(text_encoders) == 1:
        return TextStates(_with_states(text_encoders[0].call("upper", **calls[0]), parts[0]))
    first, second = text_encoders
    context = first.call("upper", **calls[0], output="penultimate")
    states: TextStates = second.call("upper_states", token_ids=lower[1].token_ids, **calls[1])
    both = map(_with_states, (context, states.context), parts)
    return TextStates(jnp.concatenate([*both], axis=-1), states.pooled)


def _with_states(
    output: Float[Array, "B T D"], learned: AdaptationArgument
) -> Float[Array, "B T+S D"]:
    """Equation (3) for one encoder."""
    acting = (one for one, _ in Acting.of(learned, None).pairs)
    added = [states for one in acting if (states := one.context_states(output)) is not None]
    return jnp.concatenate([output, *added], axis=1) if added else output
