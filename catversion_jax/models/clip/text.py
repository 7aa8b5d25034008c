"""CLIP's text encoder, with what a concept learned as an argument.

    (1)  h_0 = token_embedding[ids] + position_embedding[0..T-1], learned vectors for the class word
    (2)  h_{i+1} = layer_i(h_i; causal mask;
                           [extra keys; own keys], [extra values; own values])
    (3)  last = final_layer_norm(h_L),   penultimate = h_{L-1} (``hidden_states[-2]``, no norm)

Without a concept this is plain CLIP, bit for bit. Padding tokens are not masked, as in Stable
Diffusion. The vectors of (1), the extra keys and values of (2) and changes of a layer's own heads
come from what was learned, through :class:`~catversion_jax.models.clip.adaptation.Adaptation`.
Source: transformers ``CLIPTextModel``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.adaptation import (
    Acting,
    Adaptation,
    AdaptationArgument,
    WordPlaces,
)
from catversion_jax.models.clip.encoder import CLIPEncoder, EncoderConfig, layer_norm

Output = Literal["last", "penultimate"]


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(EncoderConfig):
    """A text encoder's ``config.json``; the defaults are transformers' own, for keys a file leaves
    out.
    """

    model_type: ClassVar[str] = "clip_text_model"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


class CLIPTextEmbeddings(nnx.Module):
    """Equation (1)."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **dtypes)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, **dtypes
        )

    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embed tokens and add positions.

        Raises:
          CatVersionError: more tokens than the encoder has positions.
        """
        num_tokens = token_ids.shape[-1]
        if num_tokens > self.position_embedding.num_embeddings:
            raise CatVersionError(
                f"{num_tokens} tokens: this text encoder has "
                f"{self.position_embedding.num_embeddings} positions. Truncate the prompt; "
                "Tokenizer does so."
            )
        return self.token_embedding(token_ids) + self.position_embedding(jnp.arange(num_tokens))

    def with_vectors(
        self,
        embedded: Float[Array, "B T D"],
        vectors: Float[Array, "V D"],
        word_places: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """``embedded`` (equation 1) with ``vectors`` in the word's places."""
        positions = self.position_embedding(jnp.arange(embedded.shape[1]))
        learned = vectors[jnp.maximum(word_places, 0)] + positions
        return jnp.where((word_places >= 0)[..., None], learned.astype(embedded.dtype), embedded)


class CLIPTextModel(nnx.Module):
    """The text encoder."""

    def __init__(
        self, config: CLIPTextConfig, *, dtype: Any = jnp.float32, param_dtype: Any, rngs: nnx.Rngs
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, **dtypes)
        self.encoder = CLIPEncoder(config, **dtypes)
        self.final_layer_norm = layer_norm(config, **dtypes)

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        learned: AdaptationArgument = None,
        word_places: WordPlaces = None,
        *,
        output: Output = "last",
    ) -> Float[Array, "B T D"]:
        """Encode prompts.

        Args:
          token_ids: ``[B T]``, padded.
          learned: what one concept learned (``[L P N H]`` or ``[V D]``), several that act
            together, or none.
          word_places: where its class word stands, ``[B T]`` of ``Tokenizer.place``; one for
            each of several. Needed where ``learned.reads_word_places``.
          output: which hidden state, equation (3).

        Raises:
          CatVersionError: a concept that does not fit this encoder, or lacks its word's places.
        """
        return self.upper(self.lower(token_ids, 0), learned, 0, word_places, output=output)

    def lower(self, token_ids: Int[Array, "B T"], layer: int) -> Float[Array, "B T D"]:
        """The plain hidden state that enters layer ``layer``. A concept whose ``first_layer`` is
        not below ``layer`` cannot change it.
        """
        hidden = self.embeddings(jnp.asarray(token_ids))
        bias = causal_bias(hidden.shape[1])
        for block in self.encoder.layers[:layer]:
            hidden = block(hidden, bias)
        return hidden

    def upper(
        self,
        hidden: Float[Array, "B T D"],
        learned: AdaptationArgument,
        layer: int,
        word_places: WordPlaces = None,
        *,
        output: Output = "last",
    ) -> Float[Array, "B T D"]:
        """The layers from ``layer`` on, equations (2) and (3); from 0 on, learned vectors too.

        Raises:
          CatVersionError: a concept that does not fit this encoder, adapts a layer below
            ``layer``, or lacks its word's places.
        """
        num_layers = len(self.encoder.layers)
        stop = {"last": num_layers, "penultimate": num_layers - 1}[output]
        acting = self.acting(learned, word_places, range(layer, stop))
        hidden = self.with_word_vectors(hidden, acting)
        hidden = self.through(hidden, acting, range(layer, stop))
        return self.final_layer_norm(hidden) if output == "last" else hidden

    def with_word_vectors(
        self, hidden: Float[Array, "B T D"], acting: Acting
    ) -> Float[Array, "B T D"]:
        """Equation (1)'s learned vectors in the places of their words."""
        for one, where in acting.pairs:
            if (vectors := one.word_vectors) is not None and where is not None:
                hidden = self.embeddings.with_vectors(hidden, vectors, where)
        return hidden

    def through(
        self, hidden: Float[Array, "B T D"], acting: Acting, layers: range
    ) -> Float[Array, "B T D"]:
        """Equation (2) at each of ``layers``."""
        bias = causal_bias(hidden.shape[1])
        for index in layers:
            extra, process = acting.extra_keys(index), acting.process_heads(index)
            hidden = self.encoder.layers[index](hidden, bias, extra, process)
        return hidden

    def token_embeddings(self, token_ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """The tokens' own embeddings, without positions."""
        return self.embeddings.token_embedding(jnp.asarray(token_ids))

    def keys_values(
        self, token_ids: Int[Array, "B T"], layers: Sequence[int]
    ) -> tuple[Float[Array, "L B T N H"], Float[Array, "L B T N H"]]:
        """The plain encoder's own keys and values at ``layers``, split into heads."""
        hidden = self.lower(token_ids, 0)
        bias = causal_bias(hidden.shape[1])
        keys, values = [], []
        for index, block in enumerate(self.encoder.layers):
            if index in layers:
                normalized = block.layer_norm1(hidden)
                keys.append(block.self_attn.heads(block.self_attn.k_proj(normalized)))
                values.append(block.self_attn.heads(block.self_attn.v_proj(normalized)))
            hidden = block(hidden, bias)
        return jnp.stack(keys), jnp.stack(values)

    def pooled(
        self, last: Float[Array, "B T D"], token_ids: Int[Array, "B T"]
    ) -> Float[Array, "B D"]:
        """The state at the end-of-text token, which summarizes a prompt.

        Configurations written before transformers 4.31 say ``eos_token_id = 2``, which is wrong;
        the highest id of the row is meant there.
        """
        ids = jnp.asarray(token_ids)
        where = ids.argmax(-1) if self.eos_token_id == 2 else (ids == self.eos_token_id).argmax(-1)
        return jnp.take_along_axis(last, where[:, None, None], axis=1)[:, 0]

    def extra_keys_mass(
        self,
        token_ids: Int[Array, "B T"],
        learned: Adaptation,
        word_places: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "L B N T"]:
        """The share of each token's attention that goes to the extra keys of ``learned``, at each
        layer that has some: lambda of ``residual.py``'s equation (2), summed over positions.
        """
        hidden = self.lower(token_ids, 0)
        acting = self.acting(learned, word_places, range(len(self.encoder.layers)))
        bias = causal_bias(hidden.shape[1])
        masses = []
        for index, block in enumerate(self.encoder.layers):
            extra, process = acting.extra_keys(index), acting.process_heads(index)
            masses += [
                block.self_attn.extra_mass(block.layer_norm1(hidden), bias, e, process)
                for e in extra
            ]
            hidden = block(hidden, bias, extra, process)
        return jnp.stack(masses)

    def acting(self, learned: AdaptationArgument, word_places: WordPlaces, layers: range) -> Acting:
        """The concepts that act, each checked against the ``layers`` of this encoder that run.

        Raises:
          CatVersionError: one that does not fit, or lacks its word's places.
        """
        acting = Acting.of(learned, word_places)
        attention = self.encoder.layers[0].self_attn
        head_dim = attention.k_proj.out_features // attention.num_heads
        acting.check(attention.num_heads, head_dim, layers)
        return acting


def causal_bias(num_tokens: int) -> Float[Array, "1 1 T T"]:
    """0 where a query may look, ``-inf`` at later positions."""
    visible = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    return jnp.where(visible, 0.0, -jnp.inf)[None, None]
