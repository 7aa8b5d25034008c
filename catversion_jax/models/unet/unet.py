r"""The denoiser of Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel`` of diffusers, NHWC.

    (1)  e(t) = [cos(t w), sin(t w)] or sin first,  w_k = 10000^{-k / (E/2 - freq_shift)},  k < E/2
    (2)  temb = W_2 act(W_1 e(t))
    (3)  down blocks -> mid block -> up blocks, each fed the skips of the down block at its depth

The prompt enters through cross-attention only, so this is where the gradient to the text encoder
comes from. Source: diffusers ``models/unets/unet_2d_condition.py`` and ``models/embeddings.py``.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from catversion_jax.array_types import Array, Float
from catversion_jax.models.layers.recompute import Recompute
from catversion_jax.models.layers.resnet import ACTIVATIONS, LayerFactory
from catversion_jax.models.unet.attention_maps import AttentionRecorder
from catversion_jax.models.unet.blocks import DownBlock, MidBlock, UpBlock
from catversion_jax.models.unet.config import UNetConfig


def timestep_embedding(
    timesteps: Float[Array, " B"], width: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "B E"]:
    """Equation (1), in float32: timesteps reach 999, beyond what half precision tells apart.

    An odd ``width`` is padded with one zero.
    """
    half = width // 2
    # On the host, rounded where torch rounds: at t = 999 the last bit of w moves the angle by 6e-5.
    exponent = (
        np.float32(-math.log(10000.0))
        * np.arange(half, dtype=np.float32)
        / np.float32(half - freq_shift)
    )
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = jnp.asarray(timesteps, jnp.float32)[:, None] * frequencies
    parts = (
        [jnp.cos(angles), jnp.sin(angles)]
        if flip_sin_to_cos
        else [jnp.sin(angles), jnp.cos(angles)]
    )
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class TimestepEmbedding(nnx.Module):
    """Equation (2)."""

    def __init__(self, in_channels: int, width: int, *, act_fn: str, layers: LayerFactory):
        self.act = ACTIVATIONS[act_fn]
        self.linear_1 = layers.linear(in_channels, width)
        self.linear_2 = layers.linear(width, width)

    def __call__(self, embedding: Float[Array, "B E"]) -> Float[Array, "B F"]:
        """Two dense layers."""
        return self.linear_2(self.act(self.linear_1(embedding)))


class UNet2DConditionModel(nnx.Module):
    """Predicts noise, velocity or image (the noise schedule knows which) from noisy latents and a
    prompt.

    Args:
      config: the folder's ``unet/config.json``, parsed.
      layers: makes the elementary layers; its dtype is that of the network.
    """

    def __init__(self, config: UNetConfig, *, layers: LayerFactory):
        widths = config.block_out_channels
        temb_channels = 4 * widths[0]
        self.config = config
        self.dtype = layers.dtype
        self.conv_in = layers.conv(config.in_channels, widths[0])
        self.time_embedding = TimestepEmbedding(
            widths[0], temb_channels, act_fn=config.act_fn, layers=layers
        )
        levels = range(len(widths))
        self.down_blocks = nnx.List(
            [
                DownBlock(config, level, temb_channels=temb_channels, layers=layers)
                for level in levels
            ]
        )
        has_mid = config.has_mid_block
        self.mid_block = (
            MidBlock(config, temb_channels=temb_channels, layers=layers) if has_mid else None
        )
        self.up_blocks = nnx.List(
            [
                UpBlock(config, level, temb_channels=temb_channels, layers=layers)
                for level in reversed(levels)
            ]
        )
        self.act = ACTIVATIONS[config.act_fn]
        self.conv_norm_out = layers.group_norm(widths[0], config.norm_num_groups, config.norm_eps)
        self.conv_out = layers.conv(widths[0], config.out_channels)

    def __call__(
        self,
        sample: Float[Array, "B h w Cin"],
        timesteps: ArrayLike,
        encoder_hidden_states: Float[Array, "B T D"],
        recompute: Recompute = "none",
    ) -> Float[Array, "B h w Cout"]:
        """Denoise once.

        Args:
          sample: noisy latents, already scaled as the sampler wants.
          timesteps: ``[B]`` or one number for the whole batch; fractions are allowed.
          encoder_hidden_states: the text encoder's output.
          recompute: what a backward pass computes again instead of keeping it.

        Returns:
          The prediction, in the computation's dtype. Any height and width work: where halving an
          odd size rounded up, the way up follows the size of the skips.
        """
        return self._denoise(sample, timesteps, encoder_hidden_states, None, recompute)

    def attention_maps(
        self,
        sample: Float[Array, "B h w Cin"],
        timesteps: ArrayLike,
        encoder_hidden_states: Float[Array, "B T D"],
        token_weights: Float[Array, "B T"],
    ) -> tuple[Float[Array, "B h w Cout"], tuple[Float[Array, "B h_l w_l"], ...]]:
        """Denoise once and return where the network looked in the text, see ``attention_maps.py``.

        Args:
          sample: as for the call, like the next two.
          timesteps: ``[B]`` or one number.
          encoder_hidden_states: ``[B T D]``.
          token_weights: how much each token counts.

        Returns:
          The prediction of the plain call, and the float32 map of every cross-attention layer in
          the order they run, at that layer's size.
        """
        recorder = AttentionRecorder(jnp.asarray(token_weights, jnp.float32))
        prediction = self._denoise(sample, timesteps, encoder_hidden_states, recorder)
        return prediction, tuple(recorder.maps)

    def _denoise(
        self,
        sample: Float[Array, "B h w Cin"],
        timesteps: ArrayLike,
        encoder_hidden_states: Float[Array, "B T D"],
        recorder: AttentionRecorder | None,
        recompute: Recompute = "none",
    ) -> Float[Array, "B h w Cout"]:
        hidden = jnp.asarray(sample, self.dtype)
        text = jnp.asarray(encoder_hidden_states, self.dtype)
        temb = self._embed(jnp.broadcast_to(jnp.asarray(timesteps), hidden.shape[:1]))
        hidden = self.conv_in(hidden)
        # Level l's up block takes what down block l made, except that each level's last output
        # (the downsampled one) goes to the level below and conv_in's goes to the outermost.
        pending = [hidden]
        for down_block in self.down_blocks:
            hidden, skips = down_block(hidden, temb, text, recorder, recompute)
            pending += skips
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, temb, text, recorder, recompute)
        for up_block in self.up_blocks:
            count = len(up_block.resnets)
            skips, pending = pending[-count:], pending[:-count]
            # conv_in's output is the last skip, so only the outermost block, which does not
            # upsample, finds none.
            _, height, width, _ = pending[-1].shape if pending else hidden.shape
            hidden = up_block(hidden, skips, temb, text, recorder, recompute, size=(height, width))
        return self.conv_out(self.act(self.conv_norm_out(hidden)))

    def _embed(self, timesteps: Float[Array, " B"]) -> Float[Array, "B E"]:
        config = self.config
        embedding = timestep_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return self.time_embedding(embedding.astype(self.dtype))
