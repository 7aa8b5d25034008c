r"""The autoencoder of Stable Diffusion 1.x and 2.x: ``AutoencoderKL`` of diffusers, NHWC.

    (1)  [mean, log var] = quant_conv(encoder(image)),   log var clamped to [-30, 20]
    (2)  q(z | image) = N(mean, diag(std^2)),   std = exp(log var / 2)
    (3)  image' = decoder(post_quant_conv(z))

Latents are unscaled here: the UNet sees ``scaling_factor * z``, and the caller multiplies. Where
the configuration has ``latents_mean`` and ``latents_std`` (Playground 2.5), ``z`` is whitened by
them: equation (1) gives ``(mean - latents_mean) / latents_std`` and (3) undoes it. Source:
diffusers ``models/autoencoders/{autoencoder_kl,vae}.py``. Two facts that bite: downsampling pads
below and right only, and every group norm has epsilon 1e-6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.layers.multi_head import Attention
from catversion_jax.models.layers.resnet import (
    ACTIVATIONS,
    PAD_BELOW_AND_RIGHT,
    Downsample2D,
    LayerFactory,
    ResnetBlock2D,
    Upsample2D,
    check_groups,
)
from catversion_jax.models.weights.hf_config import (
    check_integers,
    check_numbers,
    check_supported,
)
from catversion_jax.models.weights.network import Network

GROUP_NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)

# diffusers' own defaults, for keys a file lacks.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
}
WHITENING = ("latents_mean", "latents_std")
RANGES = {
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "latent_channels": (1, 64),
    "layers_per_block": (1, 16),
    "norm_num_groups": (1, 2**14),
}
MOST_BLOCKS = 8
IGNORED = frozenset({"force_upcast", "sample_size"})
DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """What decides an autoencoder's computation; widths run from the image to the latent.

    ``scaling_factor`` multiplies the latents that the UNet sees; the autoencoder does not use it.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    act_fn: str
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool
    scaling_factor: float
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, each way."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "vae/config.json") -> VAEConfig:
        """Read a diffusers ``AutoencoderKL`` configuration; absent keys take diffusers' defaults.

        Raises:
          CatVersionError: a key asks for something unsupported, or the keys contradict each other.
        """
        block_keys = {"down_block_types": DOWN_BLOCK, "up_block_types": UP_BLOCK}
        check_supported(
            config,
            source=source,
            used={*DEFAULTS, *block_keys, *WHITENING},
            ignored=IGNORED,
            only={"act_fn": tuple(ACTIVATIONS), "shift_factor": (0.0, None)},
        )
        values = {key: config.get(key, default) for key, default in DEFAULTS.items()}
        for key, default in DEFAULTS.items():
            kind = type(default)
            accepted = {tuple: (tuple, list), float: (float, int)}.get(kind, (kind,))
            if type(values[key]) not in accepted:
                raise CatVersionError(
                    f"{source}: {key}={shown(values[key])} must be of type {kind.__name__}. "
                    "Correct the configuration."
                )
        check_integers(values, RANGES, source=source)
        check_numbers(values, {"scaling_factor": (1e-6, 1e6)}, source=source)
        widths = values["block_out_channels"] = tuple(values["block_out_channels"])
        if not 1 <= len(widths) <= MOST_BLOCKS:
            raise CatVersionError(
                f"{source}: block_out_channels has {len(widths)} entries, must have 1 to "
                f"{MOST_BLOCKS}. Correct the configuration."
            )
        for width in widths:
            check_integers(
                {"block_out_channels": width}, {"block_out_channels": (1, 2**14)}, source=source
            )
        for key, kind_of_block in block_keys.items():
            blocks = config.get(key, [kind_of_block])
            if blocks not in ([kind_of_block] * len(widths), (kind_of_block,) * len(widths)):
                raise CatVersionError(
                    f"{source}: {key}={shown(blocks)} must be {kind_of_block!r} once for each "
                    f"entry of block_out_channels={list(widths)}. Use a Stable Diffusion 1.x or "
                    "2.x autoencoder."
                )
        check_groups(values["norm_num_groups"], values["block_out_channels"], source=source)
        mean, std = (
            _per_channel(config.get(key), key, values["latent_channels"], source=source)
            for key in WHITENING
        )
        if (mean is None) != (std is None) or not all(value > 0 for value in std or ()):
            raise CatVersionError(
                f"{source}: latents_mean = {shown(mean)} and latents_std = {shown(std)} must be "
                "given together, the latter above 0, or neither. Correct the configuration."
            )
        return cls(**values, latents_mean=mean, latents_std=std)


def _per_channel(value: Any, key: str, channels: int, *, source: str) -> tuple[float, ...] | None:
    """One number for each channel of the latents; None where there is none."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != channels:
        raise CatVersionError(
            f"{source}: {key} = {shown(value)}, must be null or a list of {channels} numbers, one "
            "for each latent channel. Correct the configuration."
        )
    for number in value:
        check_numbers({key: number}, {key: (-1e6, 1e6)}, source=source)
    return tuple(float(number) for number in value)


def _resnet(
    config: VAEConfig, in_channels: int, out_channels: int, layers: LayerFactory
) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        temb_channels=None,
        groups=config.norm_num_groups,
        epsilon=GROUP_NORM_EPSILON,
        act_fn=config.act_fn,
        layers=layers,
    )


class ImageAttention(Attention):
    """Single-head self-attention over all positions of a feature map, with its own norm and
    skip.
    """

    def __init__(self, channels: int, *, groups: int, layers: LayerFactory):
        super().__init__(channels, num_heads=1, inner_dim=channels, qkv_bias=True, layers=layers)
        self.group_norm = layers.group_norm(channels, groups, GROUP_NORM_EPSILON)

    def over_image(self, hidden: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """``hidden + attention(norm(hidden))``."""
        batch, height, width, channels = hidden.shape
        positions = self.group_norm(hidden).reshape(batch, height * width, channels)
        return hidden + self(positions).reshape(hidden.shape)


class MidBlock(nnx.Module):
    """``UNetMidBlock2D``: residual block, attention where the configuration has it, residual
    block.
    """

    def __init__(self, config: VAEConfig, *, layers: LayerFactory):
        width = config.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(config, width, width, layers) for _ in range(2)])
        groups = config.norm_num_groups
        self.attentions = nnx.List(
            [
                ImageAttention(width, groups=groups, layers=layers)
                for _ in range(config.mid_block_add_attention)
            ]
        )

    def __call__(self, hidden: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """Apply the block at the latent's resolution."""
        hidden = self.resnets[0](hidden)
        for attention in self.attentions:
            hidden = attention.over_image(hidden)
        return self.resnets[1](hidden)


class DownEncoderBlock(nnx.Module):
    """Residual blocks, then half the resolution except in the last block."""

    def __init__(self, config: VAEConfig, level: int, *, layers: LayerFactory):
        widths = config.block_out_channels
        width, in_width = widths[level], widths[max(level - 1, 0)]
        self.resnets = nnx.List(
            [
                _resnet(config, in_width if i == 0 else width, width, layers)
                for i in range(config.layers_per_block)
            ]
        )
        has_downsampler = level < len(widths) - 1
        self.downsamplers = nnx.List(
            [
                Downsample2D(width, padding=PAD_BELOW_AND_RIGHT, layers=layers)
                for _ in range(has_downsampler)
            ]
        )

    def __call__(self, hidden: Float[Array, "B h w D"]) -> Array:
        """Apply the block."""
        for resnet in self.resnets:
            hidden = resnet(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
        return hidden


class UpDecoderBlock(nnx.Module):
    """Residual blocks (one more than the encoder's), then twice the resolution except in the last
    block.
    """

    def __init__(self, config: VAEConfig, level: int, *, layers: LayerFactory):
        widths = config.block_out_channels
        width, in_width = widths[level], widths[min(level + 1, len(widths) - 1)]
        self.resnets = nnx.List(
            [
                _resnet(config, in_width if i == 0 else width, width, layers)
                for i in range(config.layers_per_block + 1)
            ]
        )
        self.upsamplers = nnx.List([Upsample2D(width, layers=layers) for _ in range(level > 0)])

    def __call__(self, hidden: Float[Array, "B h w D"]) -> Array:
        """Apply the block."""
        for resnet in self.resnets:
            hidden = resnet(hidden)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden)
        return hidden


class Encoder(nnx.Module):
    """Image to the two halves of equation (1), before ``quant_conv``."""

    def __init__(self, config: VAEConfig, *, layers: LayerFactory):
        widths = config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, widths[0])
        self.down_blocks = nnx.List(
            [DownEncoderBlock(config, i, layers=layers) for i in range(len(widths))]
        )
        self.mid_block = MidBlock(config, layers=layers)
        self.conv_norm_out = layers.group_norm(
            widths[-1], config.norm_num_groups, GROUP_NORM_EPSILON
        )
        self.conv_out = layers.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2c"]:
        """Encode."""
        hidden = self.conv_in(images)
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.mid_block(hidden)
        # silu whatever act_fn says: diffusers fixes it here.
        return self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))


class Decoder(nnx.Module):
    """Latent to image, after ``post_quant_conv``."""

    def __init__(self, config: VAEConfig, *, layers: LayerFactory):
        widths = config.block_out_channels
        self.conv_in = layers.conv(config.latent_channels, widths[-1])
        self.mid_block = MidBlock(config, layers=layers)
        levels = reversed(range(len(widths)))
        self.up_blocks = nnx.List(
            [UpDecoderBlock(config, level, layers=layers) for level in levels]
        )
        self.conv_norm_out = layers.group_norm(
            widths[0], config.norm_num_groups, GROUP_NORM_EPSILON
        )
        self.conv_out = layers.conv(widths[0], config.out_channels)

    def __call__(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Decode."""
        hidden = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))


class AutoencoderKL(nnx.Module):
    """Images to a Gaussian over latents and back.

    Args:
      config: the folder's ``vae/config.json``, parsed.
      layers: makes the elementary layers; its dtype is that of the network.
    """

    def __init__(self, config: VAEConfig, *, layers: LayerFactory):
        channels = config.latent_channels
        mean, std = config.latents_mean, config.latents_std
        self.whitening = None if mean is None or std is None else (mean, std)
        self.dtype = layers.dtype
        self.encoder = Encoder(config, layers=layers)
        self.decoder = Decoder(config, layers=layers)
        self.quant_conv = (
            layers.pointwise(2 * channels, 2 * channels) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            layers.pointwise(channels, channels) if config.use_post_quant_conv else None
        )

    def encode(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Mean and standard deviation of equation (2), unscaled, for images in [-1, 1].

        A side that is not a multiple of ``2 ** (blocks - 1)`` loses its last pixels, as in
        diffusers.
        """
        moments = self.encoder(jnp.asarray(images, self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))
        if self.whitening is not None:
            shift, scale = (jnp.asarray(row, mean.dtype) for row in self.whitening)
            return (mean - shift) / scale, std / scale
        return mean, std

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Equation (3): images, roughly in [-1, 1] and not clipped, from unscaled latents."""
        latents = jnp.asarray(latents, self.dtype)
        if self.whitening is not None:
            shift, scale = (jnp.asarray(row, self.dtype) for row in self.whitening)
            latents = latents * scale + shift
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Reconstruction through the posterior's mean."""
        return self.decode(self.encode(images)[0])


def vae_encode(
    vae: Network, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """:meth:`AutoencoderKL.encode` of a network: mean and standard deviation, unscaled."""
    return vae.call("encode", images)


def vae_decode(vae: Network, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
    """:meth:`AutoencoderKL.decode` of a network: images from unscaled latents."""
    return vae.call("decode", latents)
