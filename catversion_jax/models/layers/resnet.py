r"""Convolutional parts that the UNet and the autoencoder share, NHWC, with diffusers' attribute
names.

    (1)  h = conv1(act(norm1(x)));   h = h + time_emb_proj(act(temb))  (latter: UNet only)
    (2)  y = conv_shortcut(x) + conv2(act(norm2(h)))

Source: diffusers ``models/resnet.py`` (``ResnetBlock2D`` with ``time_embedding_norm="default"``),
``models/downsampling.py`` and ``models/upsampling.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError
from catversion_jax.models.layers.activations import gelu

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "relu": jax.nn.relu,
}

# Torch's padding=1 looks the same at every stride; XLA's 'SAME' would pad only (0, 1) at stride 2.
PAD_AROUND = ((1, 1), (1, 1))
PAD_BELOW_AND_RIGHT = ((0, 1), (0, 1))
NO_PADDING = ((0, 0), (0, 0))


class LayerFactory:
    """Makes the elementary layers of one network in one precision.

    Args:
      rngs: initial values of embeddings; kernels and biases begin at zero. Checkpoints replace
        them all, so modules are usually built under ``nnx.eval_shape``, where values that are drawn
        would have to be traced.
      dtype: of the weights and of the computation. Softmax, the norms' statistics and the time
        embedding are float32 whatever it is.
    """

    def __init__(self, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.dtype = dtype
        self.rngs = rngs

    def linear(self, in_features: int, out_features: int, *, use_bias: bool = True) -> nnx.Linear:
        """A dense layer over the last axis."""
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.dtype,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=self.rngs,
        )

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        strides: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] = PAD_AROUND,
        use_bias: bool = True,
    ) -> nnx.Conv:
        """A convolution ``[B h w in] -> [B h' w' out]``."""
        return nnx.Conv(
            in_channels,
            out_channels,
            kernel_size=(kernel_size, kernel_size),
            strides=(strides, strides),
            padding=padding,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.dtype,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=self.rngs,
        )

    def pointwise(self, in_channels: int, out_channels: int) -> nnx.Conv:
        """A 1x1 convolution; it stays one because its torch weight has four axes."""
        return self.conv(in_channels, out_channels, kernel_size=1, padding=NO_PADDING)

    def group_norm(self, channels: int, groups: int, epsilon: float) -> GroupNorm:
        """Group norm over everything but the batch."""
        return GroupNorm(channels, groups, epsilon, dtype=self.dtype, param_dtype=self.dtype)

    def layer_norm(self, features: int, epsilon: float = 1e-5) -> nnx.LayerNorm:
        """Layer norm over the last axis."""
        return nnx.LayerNorm(
            features,
            epsilon=epsilon,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.dtype,
            rngs=self.rngs,
        )


class GroupNorm(nnx.Module):
    """Group norm (arXiv 1803.08494), the channels as one axis.

    Flax's sums over ``[B h w groups C/groups]``; groups have few channels (10 in the largest images
    of Stable Diffusion), too few to fill a vector. Here every channel is averaged by itself, and
    then the few averages of a group.

    Args:
      channels: C.
      groups: must divide C.
      epsilon: added to the variance.
      dtype: of the result; the statistics are float32.
      param_dtype: of ``scale`` and ``bias``, both ``[C]``.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        epsilon: float,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))

    def __call__(self, x: Float[Array, "B *rest C"]) -> Float[Array, "B *rest C"]:
        """Over everything but the batch; in two passes, since E[x^2] - E[x]^2 would cancel."""
        wide = x.astype(jnp.float32)
        centered = wide - self._group_mean(wide)
        variance = self._group_mean(jnp.square(centered))
        scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return (centered * scale + self.bias[...]).astype(self.dtype)

    def _group_mean(self, x: Float[Array, "B *rest C"]) -> Float[Array, "B *ones C"]:
        means = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        grouped = means.reshape(*means.shape[:-1], self.groups, -1)
        return grouped.mean(axis=-1).repeat(grouped.shape[-1], axis=-1)


class ResnetBlock2D(nnx.Module):
    """Equations (1) and (2).

    Args:
      in_channels: of the input, skip connection included.
      out_channels: of the output.
      temb_channels: width of the time embedding; None in the autoencoder.
      groups: of both group norms.
      epsilon: of both group norms: 1e-5 in the UNet, 1e-6 in the autoencoder.
      act_fn: a key of ``ACTIVATIONS``.
      layers: makes the elementary layers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        groups: int,
        epsilon: float,
        act_fn: str,
        layers: LayerFactory,
    ):
        self.act = ACTIVATIONS[act_fn]
        self.norm1 = layers.group_norm(in_channels, groups, epsilon)
        self.conv1 = layers.conv(in_channels, out_channels)
        self.time_emb_proj = (
            None if temb_channels is None else layers.linear(temb_channels, out_channels)
        )
        self.norm2 = layers.group_norm(out_channels, groups, epsilon)
        self.conv2 = layers.conv(out_channels, out_channels)
        changes_width = in_channels != out_channels
        self.conv_shortcut = layers.pointwise(in_channels, out_channels) if changes_width else None

    def __call__(
        self, x: Float[Array, "B h w Cin"], temb: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B h w Cout"]:
        """Apply the block; ``temb`` is required exactly where ``temb_channels`` was given."""
        hidden = self.conv1(self.act(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(self.act(cast(Array, temb)))[:, None, None, :]
        hidden = self.conv2(self.act(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden


class Downsample2D(nnx.Module):
    """Halve height and width (rounding up) with a strided convolution.

    Args:
      channels: kept.
      padding: ``PAD_AROUND`` in the UNet, ``PAD_BELOW_AND_RIGHT`` in the autoencoder.
      layers: makes the elementary layers.
    """

    def __init__(
        self,
        channels: int,
        *,
        padding: tuple[tuple[int, int], tuple[int, int]],
        layers: LayerFactory,
    ):
        self.conv = layers.conv(channels, channels, strides=2, padding=padding)

    def __call__(self, x: Float[Array, "B h w Cin"]) -> Float[Array, "B h2 w2 Cin"]:
        """Apply the convolution."""
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Double height and width with nearest neighbours, then convolve."""

    def __init__(self, channels: int, *, layers: LayerFactory):
        self.conv = layers.conv(channels, channels)

    def __call__(
        self, x: Float[Array, "B h w Cin"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B h2 w2 Cin"]:
        """Upsample to ``size``, by default ``(2 h, 2 w)``.

        ``size`` may be ``2 h - 1``: halving an odd size rounds up, and torch's nearest
        interpolation to an odd size picks ``floor(i h / (2 h - 1)) = i // 2``, the same pixels as
        doubling and cropping.
        """
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        if size is not None:
            x = x[:, : size[0], : size[1], :]
        return self.conv(x)


def check_groups(groups: int, widths: tuple[int, ...], *, source: str) -> None:
    """Refuse a group count that does not divide every block's width.

    Raises:
      CatVersionError: names the widths that do not divide.
    """
    wrong = [width for width in widths if groups < 1 or width % groups]
    if wrong:
        raise CatVersionError(
            f"{source}: norm_num_groups={groups} must divide every entry of block_out_channels, "
            f"and does not divide {wrong}. Correct the configuration."
        )
