"""Blocks of the UNet: residual blocks, each followed by a transformer where the block has
cross-attention.

Every down block hands its intermediate results to the up block at the same depth, which consumes
them in reverse order, one per residual block. Source: diffusers ``models/unets/unet_2d_blocks.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.models.attention_maps import AttentionRecorder
from catversion_jax.models.recompute import Recompute, recomputed
from catversion_jax.models.resnet import (
    PAD_AROUND,
    Downsample2D,
    LayerFactory,
    ResnetBlock2D,
    Upsample2D,
)
from catversion_jax.models.transformer2d import Transformer2DModel
from catversion_jax.models.unet_config import UNetConfig


def _resnet(
    config: UNetConfig,
    in_channels: int,
    out_channels: int,
    temb_channels: int,
    layers: LayerFactory,
) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        temb_channels=temb_channels,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        act_fn=config.act_fn,
        layers=layers,
    )


def _transformer(
    config: UNetConfig, level: int, *, only_cross_attention: bool, layers: LayerFactory
) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        num_heads=config.num_heads[level],
        num_layers=config.transformer_layers_per_block[level],
        context_dim=config.cross_attention_dim[level],
        groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
        only_cross_attention=only_cross_attention,
        layers=layers,
    )


def _attend(
    transformer: Transformer2DModel,
    hidden: Float[Array, "B h w D"],
    text: Float[Array, "B T E"],
    recorder: AttentionRecorder | None,
    recompute: Recompute,
) -> Float[Array, "B h w D"]:
    def attend(hidden: Array, text: Array) -> Array:
        return transformer(hidden, text, recorder, recompute)

    return recomputed(attend, recompute == "blocks")(hidden, text)


def _joined(resnet: ResnetBlock2D) -> Callable[[Array, Array, Array], Array]:
    """The residual block on an input and its skip; recomputing it keeps neither twice."""
    return lambda hidden, skip, temb: resnet(jnp.concatenate([hidden, skip], axis=-1), temb)


class DownBlock(nnx.Module):
    """``DownBlock2D`` or ``CrossAttnDownBlock2D``, as the configuration says for this level.

    Args:
      config: of the whole UNet.
      level: 0 is the outermost block. The innermost has no downsampler.
      temb_channels: width of the time embedding.
      layers: makes the elementary layers.
    """

    def __init__(self, config: UNetConfig, level: int, *, temb_channels: int, layers: LayerFactory):
        width = config.block_out_channels[level]
        in_width = config.block_out_channels[max(level - 1, 0)]
        count = config.layers_per_block[level]
        self.resnets = nnx.List(
            [
                _resnet(config, in_width if i == 0 else width, width, temb_channels, layers)
                for i in range(count)
            ]
        )
        only_cross = config.only_cross_attention[level]
        self.attentions = nnx.List(
            [
                _transformer(config, level, only_cross_attention=only_cross, layers=layers)
                for _ in range(count if config.down_cross_attention[level] else 0)
            ]
        )
        has_downsampler = level < len(config.block_out_channels) - 1
        self.downsamplers = nnx.List(
            [Downsample2D(width, padding=PAD_AROUND, layers=layers) for _ in range(has_downsampler)]
        )

    def __call__(
        self,
        hidden: Float[Array, "B h w Cin"],
        temb: Float[Array, "B E"],
        text: Float[Array, "B T D"],
        recorder: AttentionRecorder | None = None,
        recompute: Recompute = "none",
    ) -> tuple[Array, list[Array]]:
        """The block's output and what the up block at this depth will want, oldest first."""
        skips = []
        for index, resnet in enumerate(self.resnets):
            hidden = recomputed(resnet.__call__, recompute == "blocks")(hidden, temb)
            if self.attentions:
                hidden = _attend(self.attentions[index], hidden, text, recorder, recompute)
            skips.append(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            skips.append(hidden)
        return hidden, skips


class MidBlock(nnx.Module):
    """``UNetMidBlock2DCrossAttn``: residual block, transformer, residual block.

    ``only_cross_attention`` does not reach it in diffusers, so it does not here.
    """

    def __init__(self, config: UNetConfig, *, temb_channels: int, layers: LayerFactory):
        width = config.block_out_channels[-1]
        self.resnets = nnx.List(
            [_resnet(config, width, width, temb_channels, layers) for _ in range(2)]
        )
        innermost = len(config.block_out_channels) - 1
        self.attentions = nnx.List(
            [_transformer(config, innermost, only_cross_attention=False, layers=layers)]
        )

    def __call__(
        self,
        hidden: Float[Array, "B h w Cin"],
        temb: Float[Array, "B E"],
        text: Float[Array, "B T D"],
        recorder: AttentionRecorder | None = None,
        recompute: Recompute = "none",
    ) -> Float[Array, "B h w Cin"]:
        """Apply the block at the lowest resolution."""
        whole = recompute == "blocks"
        first, last = (recomputed(resnet.__call__, whole) for resnet in self.resnets)
        hidden = _attend(self.attentions[0], first(hidden, temb), text, recorder, recompute)
        return last(hidden, temb)


class UpBlock(nnx.Module):
    """``UpBlock2D`` or ``CrossAttnUpBlock2D``, as the configuration says for this level.

    Args:
      config: of the whole UNet.
      level: 0 is the outermost block, which comes last and has no upsampler.
      temb_channels: width of the time embedding.
      layers: makes the elementary layers.
    """

    def __init__(self, config: UNetConfig, level: int, *, temb_channels: int, layers: LayerFactory):
        widths = config.block_out_channels
        innermost = len(widths) - 1
        width = widths[level]
        from_below = widths[min(level + 1, innermost)]
        # The last skip it consumes is the previous level's downsampled output (or conv_in's).
        from_above = widths[max(level - 1, 0)]
        count = config.layers_per_block[level] + 1
        self.resnets = nnx.List(
            [
                _resnet(
                    config,
                    (from_below if i == 0 else width) + (from_above if i == count - 1 else width),
                    width,
                    temb_channels,
                    layers,
                )
                for i in range(count)
            ]
        )
        # up_block_types runs from the innermost block outwards in the files.
        has_attention = config.up_cross_attention[innermost - level]
        only_cross = config.only_cross_attention[level]
        self.attentions = nnx.List(
            [
                _transformer(config, level, only_cross_attention=only_cross, layers=layers)
                for _ in range(count if has_attention else 0)
            ]
        )
        self.upsamplers = nnx.List([Upsample2D(width, layers=layers) for _ in range(level > 0)])

    def __call__(
        self,
        hidden: Float[Array, "B h w Cin"],
        skips: list[Array],
        temb: Float[Array, "B E"],
        text: Float[Array, "B T D"],
        recorder: AttentionRecorder | None = None,
        recompute: Recompute = "none",
        *,
        size: tuple[int, int],
    ) -> Array:
        """Consume ``skips`` (as :class:`DownBlock` gave them, last first) and upsample to
        ``size``.
        """
        for index, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            hidden = recomputed(_joined(resnet), recompute == "blocks")(hidden, skip, temb)
            if self.attentions:
                hidden = _attend(self.attentions[index], hidden, text, recorder, recompute)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, size)
        return hidden
