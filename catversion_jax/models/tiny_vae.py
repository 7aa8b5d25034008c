r"""The decoder of ``AutoencoderTiny`` (TAESD), for previews: pictures from latents in a fraction of
the autoencoder's time, a little less sharp.

    (1)  x = 3 tanh(z / 3);    image = 2 decoder(x) - 1,   z as the UNet sees it

A decoder is one list of layers: a convolution, then for each block residual parts, an upsampling
and a convolution. Source: diffusers ``models/autoencoders/{autoencoder_tiny,vae}.py``; the network
is by Ollin Boer Bohan (madebyollin/taesd).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.array_types import Array, Float
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.layers.resnet import ACTIVATIONS, LayerFactory
from catversion_jax.models.weights.convert import load_network
from catversion_jax.models.weights.hf_config import (
    check_integers,
    check_numbers,
    check_supported,
    read_config,
)
from catversion_jax.runtime.bucket_paths import home_expanded

if TYPE_CHECKING:
    from catversion_jax.models.stable_diffusion import Backbone

DEFAULTS: dict[str, Any] = {
    "out_channels": 3,
    "decoder_block_out_channels": (64, 64, 64, 64),
    "act_fn": "relu",
    "latent_channels": 4,
    "num_decoder_blocks": (3, 3, 3, 1),
    "scaling_factor": 1.0,
}
RANGES = {"out_channels": (3, 3), "latent_channels": (1, 64)}
MOST_BLOCKS = 8
PER_BLOCK = {"decoder_block_out_channels": (1, 2**12), "num_decoder_blocks": (0, 16)}
IGNORED = frozenset(
    {
        # the encoder, which is not read, and what says the decoder's widths once more
        *("in_channels", "encoder_block_out_channels", "num_encoder_blocks", "block_out_channels"),
        *("latent_magnitude", "latent_shift"),  # of latents that are stored as bytes
        "force_upcast",  # the decoder is float32
    }
)
ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": tuple(ACTIVATIONS),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "shift_factor": (0.0, None),
}


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """What decides the decoder's computation; blocks run from the latent to the image."""

    out_channels: int
    decoder_block_out_channels: tuple[int, ...]
    act_fn: str
    latent_channels: int
    num_decoder_blocks: tuple[int, ...]
    scaling_factor: float

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, each way."""
        return 2 ** (len(self.num_decoder_blocks) - 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "config.json") -> TinyVAEConfig:
        """Read a diffusers ``AutoencoderTiny`` configuration; absent keys take its defaults.

        Raises:
          CatVersionError: another kind of network, or a key that asks for something unsupported.
        """
        name = config.get("_class_name", "AutoencoderTiny")
        if name != "AutoencoderTiny":
            raise CatVersionError(
                f"{source}: is a {shown(name)}, must be an AutoencoderTiny (TAESD). Give the "
                "folder of madebyollin/taesd, or of taesdxl for Stable Diffusion XL."
            )
        used = DEFAULTS.keys()
        check_supported(config, source=source, used=used, ignored=IGNORED, only=ONLY)
        values = {key: config.get(key, default) for key, default in DEFAULTS.items()}
        check_integers(values, RANGES, source=source)
        check_numbers(values, {"scaling_factor": (1e-6, 1e6)}, source=source)
        for key, bounds in PER_BLOCK.items():
            entries = values[key]
            if not isinstance(entries, Sequence) or not 1 <= len(entries) <= MOST_BLOCKS:
                raise CatVersionError(
                    f"{source}: {key} = {shown(entries)}, must be a list of 1 to {MOST_BLOCKS} "
                    "integers. Correct the configuration."
                )
            for entry in entries:
                check_integers({key: entry}, {key: bounds}, source=source)
            values[key] = tuple(entries)
        if len({len(values[key]) for key in PER_BLOCK}) > 1:
            raise CatVersionError(
                f"{source}: {' and '.join(PER_BLOCK)} must have as many entries as each other. "
                "Correct the configuration."
            )
        return cls(**values)


class _Activation(nnx.Module):
    """A layer without weights, so that those after it have torch's index."""

    def __init__(self, act_fn: str):
        self.act = ACTIVATIONS[act_fn]

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return self.act(x)


class _Doubling(nnx.Module):
    """Nearest neighbours, twice as many each way."""

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h2 w2 D"]:
        """Repeat every position."""
        return x.repeat(2, axis=1).repeat(2, axis=2)


class TinyBlock(nnx.Module):
    """``AutoencoderTinyBlock``: three convolutions and a skip, then relu whatever ``act_fn`` is."""

    def __init__(self, width: int, act_fn: str, *, layers: LayerFactory):
        parts: list[nnx.Module] = [layers.conv(width, width)]
        for _ in range(2):
            parts += [_Activation(act_fn), layers.conv(width, width)]
        self.conv = nnx.List(parts)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """Apply the block."""
        hidden = x
        for layer in self.conv:
            hidden = layer(hidden)
        return jax.nn.relu(hidden + x)


class TinyDecoder(nnx.Module):
    """``DecoderTiny``."""

    def __init__(self, config: TinyVAEConfig, *, layers: LayerFactory):
        widths, counts = config.decoder_block_out_channels, config.num_decoder_blocks
        parts: list[nnx.Module] = [
            layers.conv(config.latent_channels, widths[0]),
            _Activation(config.act_fn),
        ]
        for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
            parts += [TinyBlock(width, config.act_fn, layers=layers) for _ in range(count)]
            if level < len(widths) - 1:
                parts += [_Doubling(), layers.conv(width, width, use_bias=False)]
            else:
                parts += [layers.conv(width, config.out_channels)]
        self.layers = nnx.List(parts)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """The list in order: pictures in [0, 1]."""
        for layer in self.layers:
            x = layer(x)
        return x


class TinyVAE(nnx.Module):
    """``AutoencoderTiny`` without its encoder."""

    def __init__(self, config: TinyVAEConfig, *, layers: LayerFactory):
        self.dtype = layers.dtype
        self.decoder = TinyDecoder(config, layers=layers)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Equation (1): images, roughly in [-1, 1] and not clipped."""
        return 2 * self.decoder(3 * jnp.tanh(jnp.asarray(latents, self.dtype) / 3)) - 1


def with_tiny_vae(backbone: Backbone, folder: str | Path) -> Backbone:
    """The same model, but pictures are decoded by the tiny autoencoder in ``folder``.

    For drawing only: it has no encoder.

    Raises:
      CatVersionError: the folder holds no ``AutoencoderTiny``, or one for other latents.
    """
    folder = home_expanded(folder)
    source = str(folder / "config.json")
    config = TinyVAEConfig.from_hf(read_config(folder), source=source)
    found = (config.latent_channels, config.downsampling)
    needed = (backbone.latent_channels, backbone.latent_downsampling)
    if found != needed:
        raise CatVersionError(
            f"{source}: decodes {found[0]} channels to {found[1]} pixels per position, but the "
            f"latents of {backbone.name} have {needed[0]} and {needed[1]}. Use the TAESD made for "
            "this model (taesd: Stable Diffusion 1.x and 2.x, taesdxl: XL)."
        )
    vae = load_network(
        lambda rngs: TinyVAE(config, layers=LayerFactory(rngs)),
        folder,
        sharding=jax.tree.leaves(backbone.vae.params)[0].sharding,
        ignore=(r"^encoder\.",),
    )
    return dataclasses.replace(backbone, vae=vae, latent_scale=config.scaling_factor)
