"""Whether the components of one model folder are of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.text import CLIPTextConfig
from catversion_jax.models.clip.text_projection import CLIPTextWithProjectionConfig
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.unet.embeddings import NUM_TIME_IDS
from catversion_jax.models.vae import VAEConfig
from catversion_jax.models.weights.variants import TEXT_ENCODERS


def check_components_fit(
    folder: Path, texts: Sequence[CLIPTextConfig], unet: UNetConfig, vae: VAEConfig
) -> None:
    """Make sure that text encoders, UNet and autoencoder are of the same widths.

    Raises:
      CatVersionError: the widths differ.
    """
    _check_text_fits(folder, texts, unet)
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise CatVersionError(
            f"{folder}: vae in_channels = {vae.in_channels} and out_channels = {vae.out_channels}, "
            "must both be 3 (red, green, blue). Use a Stable Diffusion 1.x or 2.x model."
        )
    latents = vae.latent_channels
    if unet.in_channels not in (latents, inpainting_channels(latents)) or (
        unet.out_channels != latents
    ):
        raise CatVersionError(
            f"{folder}: unet in_channels = {unet.in_channels}, out_channels = "
            f"{unet.out_channels} and vae latent_channels = {latents}: in_channels must be "
            f"{latents}, or {inpainting_channels(latents)} for inpainting, and out_channels "
            f"{latents}. Depth and upscaling models are not supported: use the text-to-image model "
            "of the same family."
        )


def inpainting_channels(latent_channels: int) -> int:
    """What the UNet of an inpainting model reads: latents, a mask, and latents of what is kept."""
    return 2 * latent_channels + 1


def _check_text_fits(folder: Path, texts: Sequence[CLIPTextConfig], unet: UNetConfig) -> None:
    """Make sure that the UNet reads what the text encoders give.

    Raises:
      CatVersionError: the widths differ, or the UNet takes a pooled state that nothing gives.
    """
    contexts = sorted(set(unet.cross_attention_dim))
    widths = [text.hidden_size for text in texts]
    if contexts != [sum(widths)]:
        names = " + ".join(f"{name} hidden_size" for name in TEXT_ENCODERS[: len(widths)])
        total = f" = {sum(widths)}" if len(widths) > 1 else ""
        raise CatVersionError(
            f"{folder}: unet cross_attention_dim = {' and '.join(map(str, contexts))} but "
            f"{names} = {' + '.join(map(str, widths))}{total}; they must be equal. The components "
            "are of different models: download the model again."
        )
    pooled = [t.projection_dim for t in texts if isinstance(t, CLIPTextWithProjectionConfig)]
    if (unet.added is None) != (not pooled):
        raise CatVersionError(
            f"{folder}: unet addition_embed_type is "
            f"{'missing' if unet.added is None else 'text_time'}, but the folder has "
            f"{len(texts)} text encoder(s); 'text_time' and a second text encoder belong together. "
            "The components are of different models: download the model again."
        )
    if unet.added is not None:
        needed = pooled[0] + NUM_TIME_IDS * unet.added.time_embed_dim
        if unet.added.width != needed:
            raise CatVersionError(
                f"{folder}: unet projection_class_embeddings_input_dim = {unet.added.width}, must "
                f"be text_encoder_2 projection_dim + {NUM_TIME_IDS} addition_time_embed_dim = "
                f"{pooled[0]} + {NUM_TIME_IDS * unet.added.time_embed_dim} = {needed}. The "
                "components are of different models: download the model again."
            )
