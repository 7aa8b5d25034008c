r"""The UNet's transformer: image positions attend to each other and to the prompt.

    (1)  x_0 = proj_in(group_norm(h)),   h [B h w c]  as  [B h*w c']
    (2)  a = x + attn1(norm1(x))              self-attention, or text if only_cross_attention
    (3)  b = a + attn2(norm2(a), text)        here, and only here, the prompt enters the picture
    (4)  x' = b + W_2 (u * gelu(g)),  [u, g] = W_1 norm3(b)                             (GEGLU)
    (5)  y = h + proj_out(x)

Source: diffusers ``models/transformers/transformer_2d.py`` (continuous input) and
``models/attention.py``. ``upcast_attention`` needs no flag: ``attention()`` computes logits and
softmax in float32 always. The group norm's epsilon is 1e-6 here, whatever ``norm_eps`` says; the
layer norms' is 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.models.layers.activations import gelu
from catversion_jax.models.layers.multi_head import Attention
from catversion_jax.models.layers.recompute import Recompute, in_slices, recomputed
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.unet.attention_maps import AttentionRecorder

GROUP_NORM_EPSILON = 1e-6
FEED_FORWARD_SLICE = 1024
"""Positions, where memory is saved."""


class GEGLU(nnx.Module):
    """The gated half of equation (4)."""

    def __init__(self, dim: int, inner_dim: int, *, layers: LayerFactory):
        self.proj = layers.linear(dim, 2 * inner_dim)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """``u * gelu(g)`` with the exact (erf) gelu."""
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * gelu(gate)


class NoDropout(nnx.Module):
    """Stands where torch's list has a dropout, so that the next layer keeps its index."""

    def __call__(self, x: Array) -> Array:
        """The identity."""
        return x


class FeedForward(nnx.Module):
    """The second term of equation (4)."""

    def __init__(self, dim: int, *, layers: LayerFactory):
        inner_dim = 4 * dim
        self.net = nnx.List(
            [GEGLU(dim, inner_dim, layers=layers), NoDropout(), layers.linear(inner_dim, dim)]
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the list in order."""
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Equations (2) to (4).

    Args:
      dim: width of the image positions.
      num_heads: of both attentions.
      context_dim: width of the text states.
      only_cross_attention: ``attn1`` reads the text instead of the image.
      layers: makes the elementary layers.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        context_dim: int,
        only_cross_attention: bool,
        layers: LayerFactory,
    ):
        self.only_cross_attention = only_cross_attention
        self.norm1 = layers.layer_norm(dim)
        self.attn1 = Attention(
            dim,
            num_heads=num_heads,
            inner_dim=dim,
            context_dim=context_dim if only_cross_attention else None,
            layers=layers,
        )
        self.norm2 = layers.layer_norm(dim)
        self.attn2 = Attention(
            dim,
            num_heads=num_heads,
            inner_dim=dim,
            context_dim=context_dim,
            layers=layers,
        )
        self.norm3 = layers.layer_norm(dim)
        self.ff = FeedForward(dim, layers=layers)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        text: Float[Array, "B T E"],
        record: Callable[[Float[Array, "B N S T"]], None] | None = None,
        recompute: Recompute = "none",
    ) -> Float[Array, "B S D"]:
        """Apply the block to image positions ``x``; ``record`` is told the softmax weights of
        attention to the text.
        """
        normed = self.norm1(x)
        if record is not None and self.only_cross_attention:
            record(self.attn1.weights(normed, text))
        attn1 = recomputed(self.attn1.__call__, recompute == "attention")
        x = x + attn1(normed, text if self.only_cross_attention else None)
        normed = self.norm2(x)
        if record is not None:
            record(self.attn2.weights(normed, text))
        x = x + self.attn2(normed, text)
        return x + self._feed_forward(self.norm3(x), recompute)

    def _feed_forward(
        self, x: Float[Array, "B S D"], recompute: Recompute
    ) -> Float[Array, "B S D"]:
        """Where a block is computed again, some positions at a time: its arrays are the largest."""
        slices, rest = divmod(x.shape[1], FEED_FORWARD_SLICE)
        if recompute != "blocks" or slices < 2 or rest:
            return self.ff(x)
        return in_slices(self.ff.__call__, x, slices)


class Transformer2DModel(nnx.Module):
    """Equations (1) to (5).

    Args:
      channels: of the image, kept.
      num_heads: must divide ``channels``.
      num_layers: transformer blocks.
      context_dim: width of the text states.
      groups: of the group norm.
      use_linear_projection: ``proj_in`` and ``proj_out`` are dense layers (SD 2.x) or 1x1
        convolutions (SD 1.x).
      only_cross_attention: see :class:`BasicTransformerBlock`.
      layers: makes the elementary layers.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        num_layers: int,
        context_dim: int,
        groups: int,
        use_linear_projection: bool,
        only_cross_attention: bool,
        layers: LayerFactory,
    ):
        projection = layers.linear if use_linear_projection else layers.pointwise
        self.norm = layers.group_norm(channels, groups, GROUP_NORM_EPSILON)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels,
                    num_heads=num_heads,
                    context_dim=context_dim,
                    only_cross_attention=only_cross_attention,
                    layers=layers,
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out = projection(channels, channels)

    def __call__(
        self,
        hidden: Float[Array, "B h w D"],
        text: Float[Array, "B T E"],
        recorder: AttentionRecorder | None = None,
        recompute: Recompute = "none",
    ) -> Float[Array, "B h w D"]:
        """Let every image position attend to the others and to the text."""
        batch, height, width, channels = hidden.shape
        # A dense layer and a 1x1 convolution both act on the last axis, so the order of reshape and
        # projection, which differs between SD 1.x and 2.x in diffusers, does not matter here.
        x = self.proj_in(self.norm(hidden)).reshape(batch, height * width, channels)
        record = None if recorder is None else recorder.at(height, width)
        for block in self.transformer_blocks:
            x = block(x, text, record, recompute)
        return hidden + self.proj_out(x.reshape(batch, height, width, channels))
