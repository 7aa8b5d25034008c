"""The transformer that CLIP's text and vision encoders share: pre-norm attention and MLP.

Source: transformers ``models/clip/modeling_clip.py`` (CLIPAttention, CLIPMLP, CLIPEncoderLayer,
CLIPEncoder).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.adaptation import ExtraKeys, Heads, ProcessHeads
from catversion_jax.models.layers.activations import gelu, quick_gelu
from catversion_jax.models.layers.attention import attention
from catversion_jax.models.weights.hf_config import (
    TRANSFORMERS_IGNORED,
    check_integers,
    check_numbers,
    check_supported,
)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}


SIZES = {
    "hidden_size": (1, 2**14),
    "intermediate_size": (1, 2**17),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 1024),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (3, 2**14),
    "eos_token_id": (0, 2**22),
    "projection_dim": (1, 2**14),
    "num_channels": (1, 16),
    "image_size": (1, 2**12),
    "patch_size": (1, 2**12),
}
"""Ranges of the sizes; the largest CLIP (bigG) has 48 layers of width 1664."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the transformer, by their names in ``config.json``."""

    model_type: ClassVar[str]

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str) -> Self:
        """From a parsed ``config.json``.

        Raises:
          CatVersionError: a key that changes the computation and is not supported.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        check_supported(
            config,
            source=source,
            used=fields,
            ignored=TRANSFORMERS_IGNORED,
            only={"hidden_act": tuple(ACTIVATIONS), "model_type": (cls.model_type,)},
        )
        check_integers(config, {k: v for k, v in SIZES.items() if k in fields}, source=source)
        check_numbers(config, {"layer_norm_eps": (1e-20, 1.0)}, source=source)
        made = cls(**{name: value for name, value in config.items() if name in fields})
        if made.hidden_size % made.num_attention_heads:
            raise CatVersionError(
                f"{source}: num_attention_heads = {made.num_attention_heads} must divide "
                f"hidden_size = {made.hidden_size}. Use such a model, or correct the file."
            )
        return made


class CLIPAttention(nnx.Module):
    """Multi-head self-attention; what was learned may change its heads and add keys and values."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear,
            config.hidden_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.num_heads = config.num_attention_heads
        self.q_proj = linear()
        self.k_proj = linear()
        self.v_proj = linear()
        self.out_proj = linear()

    def heads(self, projected: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Split the width into heads."""
        return projected.reshape(*projected.shape[:-1], self.num_heads, -1)

    def projected(self, hidden: Float[Array, "B T D"], process: Sequence[ProcessHeads]) -> Heads:
        """Queries, keys and values of ``hidden``, changed by each of ``process`` in turn."""
        query, key, value = (self.heads(p(hidden)) for p in (self.q_proj, self.k_proj, self.v_proj))
        for change in process:
            query, key, value = change(query, key, value)
        return query, key, value

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        bias: Float[Array, "1 1 T T"] | None = None,
        extra: Sequence[ExtraKeys] = (),
        process: Sequence[ProcessHeads] = (),
    ) -> Float[Array, "B T D"]:
        """Attend.

        Args:
          hidden: ``[B T D]``.
          bias: added to the logits of the layer's own positions.
          extra: keys and values that stand before the layer's own.
          process: changes of the layer's own queries, keys and values.
        """
        query, key, value = self.projected(hidden, process)
        if extra:
            key = _prepend([e.key for e in extra], key)
            value = _prepend([e.value for e in extra], value)
            bias = _extend_bias(bias, extra, num_queries=query.shape[1])
        out = attention(query, key, value, bias=bias)
        return self.out_proj(out.reshape(hidden.shape))

    def extra_mass(
        self,
        hidden: Float[Array, "B T D"],
        bias: Float[Array, "1 1 T T"],
        extra: ExtraKeys,
        process: Sequence[ProcessHeads] = (),
    ) -> Float[Array, "B N T"]:
        """Share of the attention that goes to the extra positions: lambda of ``residual.py``."""
        query, key, _ = self.projected(hidden, process)
        key = _prepend([extra.key], key)
        bias = _extend_bias(bias, [extra], num_queries=query.shape[1])
        # Values that are 1 on the extra positions and 0 on the own ones sum up their weights.
        is_extra = (jnp.arange(key.shape[1]) < extra.key.shape[0]).astype(jnp.float32)
        value = jnp.broadcast_to(is_extra[None, :, None, None], (*key.shape[:3], 1))
        return attention(query, key, value, bias=bias)[..., 0].swapaxes(1, 2)


def _prepend(vectors: Sequence[Float[Array, "P N H"]], own: Float[Array, "B T N H"]) -> Array:
    shared = jnp.concatenate(vectors, axis=0).astype(own.dtype)
    return jnp.concatenate([jnp.broadcast_to(shared, (own.shape[0], *shared.shape)), own], axis=1)


def _extend_bias(bias: Array | None, extra: Sequence[ExtraKeys], num_queries: int) -> Array:
    own = jnp.zeros((1, 1, num_queries, num_queries), jnp.float32) if bias is None else bias
    columns = [_extra_bias(e, num_queries) for e in extra]
    batch = max(part.shape[0] for part in columns)
    parts = [jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in (*columns, own)]
    return jnp.concatenate(parts, axis=-1)  # [B or 1, 1 T P+T]


def _extra_bias(extra: ExtraKeys, num_queries: int) -> Float[Array, "#B 1 T P"]:
    columns = jnp.full((1, 1, num_queries, extra.key.shape[0]), extra.logit_bias, jnp.float32)
    if extra.visible is None:
        return columns
    return jnp.where(extra.visible[:, None, :, None], columns, -jnp.inf)


class CLIPMLP(nnx.Module):
    """Two linear layers with the configuration's activation between."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.activation = config.hidden_act
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply position by position."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(hidden)))


class CLIPEncoderLayer(nnx.Module):
    """Attention, then MLP, each on the normalized input and added to it."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layer_norm1 = layer_norm(config, **dtypes)
        self.self_attn = CLIPAttention(config, **dtypes)
        self.layer_norm2 = layer_norm(config, **dtypes)
        self.mlp = CLIPMLP(config, **dtypes)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        bias: Float[Array, "1 1 T T"] | None = None,
        extra: Sequence[ExtraKeys] = (),
        process: Sequence[ProcessHeads] = (),
    ) -> Float[Array, "B T D"]:
        """One layer; arguments as for :class:`CLIPAttention`."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), bias, extra, process)
        return hidden + self.mlp(self.layer_norm2(hidden))


class CLIPEncoder(nnx.Module):
    """The stack of layers; callers iterate over ``layers``."""

    def __init__(self, config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.layers = nnx.List(
            CLIPEncoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )


def layer_norm(
    config: EncoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """Layer norm as PyTorch computes it: variance from centred values, in float32."""
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
