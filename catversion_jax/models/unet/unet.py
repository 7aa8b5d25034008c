"""The denoiser of Stable Diffusion 1.x, 2.x and XL: ``UNet2DConditionModel`` of diffusers, NHWC.

    down blocks -> mid block -> up blocks, each fed the skips of the down block at its depth

The prompt enters through cross-attention, and in XL through the vector of ``embeddings.py`` too:
these are where the gradient to the text encoders comes from. Source: diffusers
``models/unets/unet_2d_condition.py``.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError
from catversion_jax.models.layers.recompute import Recompute
from catversion_jax.models.layers.resnet import ACTIVATIONS, LayerFactory
from catversion_jax.models.unet.attention_maps import AttentionRecorder
from catversion_jax.models.unet.blocks import DownBlock, MidBlock, UpBlock
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.unet.embeddings import (
    AddedConditions,
    TimestepEmbedding,
    timestep_embedding,
)


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
            widths[0],
            temb_channels,
            act_fn=config.act_fn,
            guidance_width=config.guidance_width,
            layers=layers,
        )
        self.add_embedding = (
            TimestepEmbedding(config.added.width, temb_channels, act_fn="silu", layers=layers)
            if config.added is not None
            else None
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
        *,
        added: AddedConditions | None = None,
        guidance: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B h w Cout"]:
        """Denoise once.

        Args:
          sample: noisy latents, already scaled as the sampler wants.
          timesteps: ``[B]`` or one number for the whole batch; fractions are allowed.
          encoder_hidden_states: the text encoder's output, or both encoders' side by side.
          recompute: what a backward pass computes again instead of keeping it.
          added: what Stable Diffusion XL is told beside the prompt; None for the others.
          guidance: the guidance scale, for networks that were distilled with it.

        Returns:
          The prediction, in the computation's dtype. Any height and width work: where halving an
          odd size rounded up, the way up follows the size of the skips.

        Raises:
          CatVersionError: ``added`` is missing, of other widths, or not what this network takes;
            ``guidance`` where it takes none.
        """
        return self._denoise(
            sample,
            timesteps,
            encoder_hidden_states,
            None,
            recompute,
            added=added,
            guidance=guidance,
        )

    def attention_maps(
        self,
        sample: Float[Array, "B h w Cin"],
        timesteps: ArrayLike,
        encoder_hidden_states: Float[Array, "B T D"],
        token_weights: Float[Array, "B T"],
        *,
        added: AddedConditions | None = None,
    ) -> tuple[Float[Array, "B h w Cout"], tuple[Float[Array, "B h_l w_l"], ...]]:
        """Denoise once and return where the network looked in the text, see ``attention_maps.py``.

        Args:
          sample: as for the call, like the next two.
          timesteps: ``[B]`` or one number.
          encoder_hidden_states: ``[B T D]``.
          token_weights: how much each token counts.
          added: as for the call.

        Returns:
          The prediction of the plain call, and the float32 map of every cross-attention layer in
          the order they run, at that layer's size.
        """
        recorder = AttentionRecorder(jnp.asarray(token_weights, jnp.float32))
        prediction = self._denoise(sample, timesteps, encoder_hidden_states, recorder, added=added)
        return prediction, tuple(recorder.maps)

    def _denoise(
        self,
        sample: Float[Array, "B h w Cin"],
        timesteps: ArrayLike,
        encoder_hidden_states: Float[Array, "B T D"],
        recorder: AttentionRecorder | None,
        recompute: Recompute = "none",
        *,
        added: AddedConditions | None,
        guidance: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B h w Cout"]:
        hidden = jnp.asarray(sample, self.dtype)
        text = jnp.asarray(encoder_hidden_states, self.dtype)
        steps = jnp.broadcast_to(jnp.asarray(timesteps), hidden.shape[:1])
        temb = self._embed(steps, added, guidance)
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

    def _embed(
        self,
        timesteps: Float[Array, " B"],
        added: AddedConditions | None,
        guidance: Float[Array, " B"] | None,
    ) -> Float[Array, "B E"]:
        """Equations (2) to (4) of ``embeddings.py``."""
        temb = self.time_embedding(
            self._wave(timesteps, self.config.block_out_channels[0]), self._guidance(guidance)
        )
        widths = self.config.added
        if (added is None) != (widths is None):
            raise CatVersionError(
                "added=None: this UNet (addition_embed_type = 'text_time', as in Stable Diffusion "
                "XL) needs the pooled state of the prompt and the time ids. Give AddedConditions."
                if added is None
                else "added: this UNet has no addition_embed_type and takes none. Leave it out."
            )
        if added is None or widths is None or self.add_embedding is None:
            return temb
        numbers = self._wave(jnp.ravel(added.time_ids), widths.time_embed_dim)
        numbers = numbers.reshape(len(added.time_ids), -1)
        given = jnp.concatenate([jnp.asarray(added.pooled, self.dtype), numbers], axis=-1)
        if given.shape[-1] != widths.width:
            raise CatVersionError(
                f"added: pooled {list(added.pooled.shape)} and time_ids "
                f"{list(added.time_ids.shape)} make {given.shape[-1]} numbers, must be "
                f"projection_class_embeddings_input_dim = {widths.width}. Give the pooled state "
                "of this model's second text encoder and six time ids."
            )
        return temb + self.add_embedding(given)

    def _guidance(self, scale: Float[Array, " B"] | None) -> Float[Array, "B G"] | None:
        """The wave in equation (4)."""
        if scale is None:
            return None
        width = self.config.guidance_width
        if width is None:
            raise CatVersionError(
                "guidance: this UNet has no time_cond_proj_dim and takes no guidance scale. Leave "
                "it out."
            )
        wave = timestep_embedding(1000 * (scale - 1), width, flip_sin_to_cos=False, freq_shift=1)
        return wave.astype(self.dtype)

    def _wave(self, numbers: Float[Array, " B"], width: int) -> Float[Array, "B E"]:
        """Equation (1), in the computation's dtype."""
        config = self.config
        embedding = timestep_embedding(
            numbers,
            width,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return embedding.astype(self.dtype)
