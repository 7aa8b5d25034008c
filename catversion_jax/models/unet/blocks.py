"""Blocks of the UNet: residual blocks, each followed by a transformer where the block has
cross-attention.

Every down block hands its intermediate results to the up block at the same depth, which consumes
them in reverse order, one per residual block. Source: diffusers ``models/unets/unet_2d_blocks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.models.layers.recompute import Recompute, recomputed
from catversion_jax.models.layers.resnet import (
    PAD_AROUND,
    Downsample2D,
    LayerFactory,
    ResnetBlock2D,
    Upsample2D,
)
from catversion_jax.models.unet.attention_maps import AttentionRecorder
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.unet.transformer import Transformer2DModel


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
    config: UNetConfig, level: int, depth: int, *, only_cross_attention: bool, layers: LayerFactory
) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        num_heads=config.num_heads[level],
        num_layers=depth,
        context_dim=config.cross_attention_dim[level],
        groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
        only_cross_attention=only_cross_attention,
        layers=layers,
    )


def _layer(
    resnet: ResnetBlock2D,
    transformer: Transformer2DModel | None,
    recorder: AttentionRecorder | None,
    recompute: Recompute,
) -> Callable[..., Float[Array, "B h w D"]]:
    """A residual block and the transformer behind it, as one function: recomputing both keeps only
    their input, and a skip not twice.
    """

    def apply(hidden: Array, temb: Array, text: Array, *skip: Array) -> Array:
        hidden = resnet(jnp.concatenate([hidden, *skip], axis=-1), temb)
        return hidden if transformer is None else transformer(hidden, text, recorder, recompute)

    return recomputed(apply, recompute == "blocks")


def _layers(
    resnets: Sequence[ResnetBlock2D],
    transformers: Sequence[Transformer2DModel | None],
    recorder: AttentionRecorder | None,
    recompute: Recompute,
) -> list[Callable[..., Float[Array, "B h w D"]]]:
    """:func:`_layer` for every residual block; ``transformers`` is empty where there are none."""
    pairs = zip(resnets, transformers or [None] * len(resnets), strict=True)
    return [_layer(*pair, recorder, recompute) for pair in pairs]


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
                _transformer(config, level, depth, only_cross_attention=only_cross, layers=layers)
                for depth in config.down_depths[level]
                if config.down_cross_attention[level]
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
        for layer in _layers(self.resnets, self.attentions, recorder, recompute):
            hidden = layer(hidden, temb, text)
            skips.append(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            skips.append(hidden)
        return hidden, skips


class MidBlock(nnx.Module):
    """``UNetMidBlock2DCrossAttn``: residual block, transformer, residual block; or the single
    residual block of ``UNetMidBlock2D``.

    ``only_cross_attention`` does not reach it in diffusers, so it does not here.
    """

    def __init__(self, config: UNetConfig, *, temb_channels: int, layers: LayerFactory):
        width = config.block_out_channels[-1]
        innermost = len(config.block_out_channels) - 1
        depths = config.down_depths[innermost][:1] if config.mid_cross_attention else ()
        self.resnets = nnx.List(
            [_resnet(config, width, width, temb_channels, layers) for _ in range(1 + len(depths))]
        )
        self.attentions = nnx.List(
            [
                _transformer(config, innermost, depth, only_cross_attention=False, layers=layers)
                for depth in depths
            ]
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
        transformers = [*self.attentions, None]
        for layer in _layers(self.resnets, transformers, recorder, recompute):
            hidden = layer(hidden, temb, text)
        return hidden


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
                _transformer(config, level, depth, only_cross_attention=only_cross, layers=layers)
                for depth in config.up_depths[level]
                if has_attention
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
        layers = _layers(self.resnets, self.attentions, recorder, recompute)
        for layer, skip in zip(layers, reversed(skips), strict=True):
            hidden = layer(hidden, temb, text, skip)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, size)
        return hidden
