"""The second text encoder of Stable Diffusion XL, which gives a prompt's states and their summary.

    (1)  penultimate = h_{L-1}                                    what the UNet attends to
    (2)  pooled = W_p final_layer_norm(h_L)[end-of-text token]    what joins its time embedding

Both come from one pass, so the last layer acts on (2) alone. Source: transformers
``CLIPTextModelWithProjection``; which states are taken, diffusers ``StableDiffusionXLPipeline``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.adaptation import AdaptationArgument, WordPlaces
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextStates:
    """What a prompt becomes.

    Attributes:
      context: ``[B T D]``, what the UNet's cross-attention reads; longer than the prompt where
        concepts have states of their own.
      pooled: ``[B P]``, the prompt in one vector; None in models whose UNet takes none.
    """

    context: Float[Array, "B T D"]
    pooled: Float[Array, "B P"] | None = None


@dataclasses.dataclass(frozen=True)
class CLIPTextWithProjectionConfig(CLIPTextConfig):
    """The ``config.json`` of a text encoder with a projection."""

    projection_dim: int = 512


class CLIPTextModelWithProjection(CLIPTextModel):
    """A text encoder whose pooled state is projected."""

    def __init__(
        self,
        config: CLIPTextWithProjectionConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.text_projection = nnx.Linear(
            config.hidden_size,
            config.projection_dim,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def states(
        self,
        token_ids: Int[Array, "B T"],
        learned: AdaptationArgument = None,
        word_places: WordPlaces = None,
    ) -> TextStates:
        """Equations (1) and (2) of prompts; the arguments are those of :class:`CLIPTextModel`.

        Raises:
          CatVersionError: a concept that does not fit this encoder, or lacks its word's places.
        """
        return self.upper_states(self.lower(token_ids, 0), token_ids, learned, 0, word_places)

    def upper_states(
        self,
        hidden: Float[Array, "B T D"],
        token_ids: Int[Array, "B T"],
        learned: AdaptationArgument,
        layer: int,
        word_places: WordPlaces = None,
    ) -> TextStates:
        """The same from ``hidden`` on, the state that enters layer ``layer`` (see ``lower``).

        Raises:
          CatVersionError: no layer is left to run, or as for :meth:`states`.
        """
        num_layers = len(self.encoder.layers)
        if not 0 <= layer < num_layers:
            raise CatVersionError(
                f"layer={layer}: must be within 0..{num_layers - 1}, since both states are made "
                "by the layers from there on."
            )
        acting = self.acting(learned, word_places, range(layer, num_layers))
        hidden = self.with_word_vectors(hidden, acting)
        penultimate = self.through(hidden, acting, range(layer, num_layers - 1))
        last = self.through(penultimate, acting, range(num_layers - 1, num_layers))
        pooled = self.pooled(self.final_layer_norm(last), token_ids)
        return TextStates(penultimate, self.text_projection(pooled))
