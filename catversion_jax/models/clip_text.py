"""CLIP's text encoder, with a concept's keys and values as an argument.

    (1)  h_0 = token_embedding[ids] + position_embedding[0..T-1]
    (2)  h_{i+1} = layer_i(h_i; causal mask;
                           [residual keys; own keys], [residual values; own values])
    (3)  last = final_layer_norm(h_L),   penultimate = h_{L-1} (``hidden_states[-2]``, no norm)

Without a residual (2) is plain CLIP, bit for bit. Padding tokens are not masked, as in Stable
Diffusion. Source: transformers ``CLIPTextModel``; the residual is METHOD equation (1), see
``residual.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip_encoder import (
    CLIPEncoder,
    EncoderConfig,
    ExtraKeys,
    layer_norm,
)
from catversion_jax.residual import KVResidual

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
        residual: KVResidual | Sequence[KVResidual] | None = None,
        *,
        output: Output = "last",
    ) -> Float[Array, "B T D"]:
        """Encode prompts.

        Args:
          token_ids: ``[B T]``, padded.
          residual: one concept (``[L P N H]``), several that act together, or none.
          output: which hidden state, equation (3).

        Raises:
          CatVersionError: a residual that does not fit this encoder.
        """
        return self.upper(self.lower(token_ids, 0), residual, 0, output=output)

    def lower(self, token_ids: Int[Array, "B T"], layer: int) -> Float[Array, "B T D"]:
        """The plain hidden state that enters layer ``layer``: what no residual from there on can
        change.
        """
        hidden = self.embeddings(jnp.asarray(token_ids))
        bias = causal_bias(hidden.shape[1])
        for block in self.encoder.layers[:layer]:
            hidden = block(hidden, bias)
        return hidden

    def upper(
        self,
        hidden: Float[Array, "B T D"],
        residual: KVResidual | Sequence[KVResidual] | None,
        layer: int,
        *,
        output: Output = "last",
    ) -> Float[Array, "B T D"]:
        """The layers from ``layer`` on, equations (2) and (3).

        Raises:
          CatVersionError: a residual that does not fit this encoder, or adapts a layer below
            ``layer``.
        """
        num_layers = len(self.encoder.layers)
        stop = {"last": num_layers, "penultimate": num_layers - 1}[output]
        residuals = [residual] if isinstance(residual, KVResidual) else list(residual or ())
        for one in residuals:
            self._check_fits(one, range(layer, stop))
        bias = causal_bias(hidden.shape[1])
        for index in range(layer, stop):
            hidden = self.encoder.layers[index](hidden, bias, extra_keys(residuals, index))
        return self.final_layer_norm(hidden) if output == "last" else hidden

    def keys_values(
        self, token_ids: Int[Array, "B T"], layers: Sequence[int]
    ) -> tuple[Float[Array, "L B T N H"], Float[Array, "L B T N H"]]:
        """The plain encoder's own keys and values at ``layers``, in a residual's layout."""
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

    def _check_fits(self, residual: KVResidual, layers: range) -> None:
        attention = self.encoder.layers[0].self_attn
        heads = (attention.num_heads, attention.k_proj.out_features // attention.num_heads)
        expected = (
            len(residual.layers),
            residual.key.shape[-3] if residual.key.ndim >= 3 else "P",
            *heads,
        )
        if residual.key.shape != expected or residual.value.shape != expected:
            raise CatVersionError(
                f"residual with key {list(residual.key.shape)}, value {list(residual.value.shape)} "
                f"and layers {residual.layers}: this text encoder needs [layers, positions, heads, "
                f"head size] = {list(expected)}. Use a concept trained on this model; vmap over "
                "concepts outside."
            )
        if not set(residual.layers) <= set(layers):
            raise CatVersionError(
                f"residual on layers {residual.layers}: only layers "
                f"{layers.start}..{layers.stop - 1} run here. Use a concept trained on this model."
            )


def extra_keys(residuals: Sequence[KVResidual], layer: int) -> list[ExtraKeys]:
    """What each residual concatenates at one layer; empty where none adapts it."""
    extra = []
    for residual in residuals:
        pair = residual.at_layer(layer)
        if pair is not None:
            extra.append(ExtraKeys(*pair, residual.logit_bias))
    return extra


def causal_bias(num_tokens: int) -> Float[Array, "1 1 T T"]:
    """0 where a query may look, ``-inf`` at later positions."""
    visible = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    return jnp.where(visible, 0.0, -jnp.inf)[None, None]
