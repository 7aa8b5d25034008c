"""Multi-head attention with diffusers' attribute names, for the UNet and the autoencoder.

Source: diffusers ``models/attention_processor.py`` (``Attention``).
"""

from __future__ import annotations

from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.models.layers.attention import attention, attention_weights
from catversion_jax.models.layers.resnet import LayerFactory


class Attention(nnx.Module):
    """Multi-head attention of ``[B T D]`` on itself or on a context.

    Args:
      query_dim: width of the input and the output.
      num_heads: heads; each has ``inner_dim // num_heads`` dimensions.
      inner_dim: width of queries, keys and values.
      context_dim: width of the context; None for self-attention.
      qkv_bias: whether ``to_q``, ``to_k`` and ``to_v`` have a bias (``to_out`` always has).
      layers: makes the elementary layers.
    """

    def __init__(
        self,
        query_dim: int,
        *,
        num_heads: int,
        inner_dim: int,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        layers: LayerFactory,
    ):
        self.num_heads = num_heads
        context_dim = query_dim if context_dim is None else context_dim
        self.to_q = layers.linear(query_dim, inner_dim, use_bias=qkv_bias)
        self.to_k = layers.linear(context_dim, inner_dim, use_bias=qkv_bias)
        self.to_v = layers.linear(context_dim, inner_dim, use_bias=qkv_bias)
        # torch holds a dropout at index 1
        self.to_out = nnx.List([layers.linear(inner_dim, query_dim)])

    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attend to ``context``, or to ``x`` itself without one."""
        context = x if context is None else context
        query, key, value = (
            self._heads(projected)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )  # [B T N H], [B S N H] twice
        out = attention(query, key, value)
        return self.to_out[0](out.reshape(*out.shape[:-2], -1))

    def weights(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"]
    ) -> Float[Array, "B N T S"]:
        """How much every position of ``x`` attends to each of the context, float32."""
        return attention_weights(self._heads(self.to_q(x)), self._heads(self.to_k(context)))

    def _heads(self, projected: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        return projected.reshape(*projected.shape[:-1], self.num_heads, -1)
