"""Object masks from the model's own attention: where its UNet reads the base-class word.

The image is encoded, noised to a few levels, and shown to the UNet with the prompt "a photo of a
{class}". Every cross-attention layer says how much each position attends to the tokens of the class
word (DAAM, arXiv 2210.04885). The maps are averaged over noises, scaled to 0..1 per layer, averaged
over the finer layers, fitted to the image's edges and thresholded (``object_masks.py``). No weights
besides the model's own are needed, and the same image gives the same mask whatever else is in the
call: noises depend on level and draw only, batches have one size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float, Int, Key
from catversion_jax.concepts.object_masks import mask_from_map
from catversion_jax.concepts.prompts import with_class_word
from catversion_jax.config.masks import MaskSettings
from catversion_jax.diffusion import NoiseSchedule, noise_schedule
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.vae import vae_encode
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.batches import full_batches
from catversion_jax.runtime.random_normal import standard_normal
from catversion_jax.sampling.encoding import (
    Conditions,
    conditions,
    encode_text,
    stack_conditions,
)

PROMPT = "a photo of a {}"
BATCH = 4


def class_word_masks(
    backbone: Backbone,
    pixels: Int[np.ndarray, "n H W 3"],
    base_classes: Sequence[str],
    settings: MaskSettings | None = None,
) -> Int[np.ndarray, "n H W"]:
    """The mask of the object that ``base_classes`` names in each image.

    Args:
      backbone: the frozen networks.
      pixels: uint8, any square or oblong size the model can encode; its own resolution is best.
      base_classes: one per image.
      settings: None is the defaults.

    Returns:
      uint8, 255 on the object and 0 elsewhere. The map is relative to the image, so an image
      without the object gets a mask too.

    Raises:
      CatVersionError: sizes, types or words that cannot be, or a model that gives NaN.
    """
    settings = settings or MaskSettings()
    maps = class_word_maps(backbone, pixels, base_classes, settings)
    masks = [
        mask_from_map(belonging, image, edge_window=settings.edge_window)
        for belonging, image in zip(maps, pixels, strict=True)
    ]
    return np.stack(masks)


def class_word_maps(
    backbone: Backbone,
    pixels: Int[np.ndarray, "n H W 3"],
    base_classes: Sequence[str],
    settings: MaskSettings,
) -> Float[np.ndarray, "n H W"]:
    """How much each pixel belongs to the class word, 0..1; arguments as for
    :func:`class_word_masks`.
    """
    if backbone.inpaints:
        raise CatVersionError(
            f"{backbone.name}: is an inpainting model, whose attention makes no masks. Give the "
            "text-to-image model of the same family."
        )
    _check_images(backbone, pixels, base_classes)
    read = {word: _read_word(backbone, word) for word in dict.fromkeys(base_classes)}
    schedule = noise_schedule(backbone.noise_schedule)
    timesteps, keys = _noises(settings, schedule.num_train_timesteps)
    scale = jax.device_put(np.float32(backbone.latent_scale))
    maps = []
    for rows in full_batches(len(pixels), BATCH):
        states, weights = zip(*(read[base_classes[i]] for i in rows), strict=True)
        texts = stack_conditions([conditions(one, *pixels.shape[1:3]) for one in states])
        maps.append(
            np.asarray(
                _mean_maps(
                    backbone.unet,
                    backbone.vae,
                    schedule,
                    *jax.device_put((pixels[rows], texts, np.stack(weights), timesteps)),
                    keys,
                    scale,
                    settings.min_map_side,
                )
            )
        )
    found = np.concatenate(maps)[: len(pixels)]
    if not np.isfinite(found).all():
        raise CatVersionError(
            "the model's attention is not finite for these images. Check that its VAE is intact "
            "(some fp16 VAE files overflow; use the float32 file)."
        )
    return found


def _check_images(
    backbone: Backbone, pixels: Int[np.ndarray, "n H W 3"], base_classes: Sequence[str]
) -> None:
    """Make sure that the model can encode the images, and that each has a word.

    Raises:
      CatVersionError: an image cannot be encoded, or there are more or fewer words than images.
    """
    factor = backbone.latent_downsampling
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels):
        raise CatVersionError(
            f"pixels of type {pixels.dtype} and shape {pixels.shape}: must be uint8 [n H W 3] with "
            "at least one image."
        )
    if any(side < factor or side % factor for side in pixels.shape[1:3]):
        raise CatVersionError(
            f"images of {pixels.shape[2]} x {pixels.shape[1]}: both sides must be multiples of "
            f"{factor}, the VAE's factor of this model. Resize them, best to "
            f"{backbone.default_resolution}."
        )
    if len(base_classes) != len(pixels):
        raise CatVersionError(
            f"{len(base_classes)} base classes for {len(pixels)} images: give one per image."
        )


def _read_word(backbone: Backbone, base_class: str) -> tuple[TextStates, Float[np.ndarray, " T"]]:
    """The prompt's text states, and the weight of its tokens: 1 / count on the class word's.

    The places are those of the first tokenizer; the second one of Stable Diffusion XL reads words
    as the first does.
    """
    prompt = with_class_word(PROMPT, base_class)
    tokenizer = backbone.tokenizers[0]
    ids = tokenizer([prompt])[0]
    positions = tokenizer.word_positions(ids, base_class)
    if not positions:
        raise CatVersionError(
            f"base class {base_class!r}: the model does not read all of it in {prompt!r}, which "
            f"may have {backbone.context_length} tokens. Use a shorter base class."
        )
    weights = np.zeros(len(ids), np.float32)
    weights[list(positions)] = 1 / len(positions)
    return encode_text(backbone, prompt, ()), weights


def _noises(
    settings: MaskSettings, num_train_timesteps: int
) -> tuple[Int[np.ndarray, " K"], Key[Array, " K"]]:
    """Timestep and key of every look at an image."""
    levels = [int(level * num_train_timesteps) for level in settings.noise_levels]
    timesteps = np.repeat(np.array(levels, np.int32), settings.num_draws)
    draws = np.tile(np.arange(settings.num_draws, dtype=np.uint32), len(levels))
    fold_in = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(jax.random.key)(timesteps.astype(np.uint32))
    return timesteps, fold_in(keys, draws)


# ---- compiled function ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=9)
def _mean_maps(
    unet: Network,
    vae: Network,
    schedule: NoiseSchedule,
    pixels: Int[Array, "B H W 3"],
    texts: Conditions,
    token_weights: Float[Array, "B T"],
    timesteps: Int[Array, " K"],
    keys: Key[Array, " K"],
    latent_scale: Float[Array, ""],
    min_map_side: int,
) -> Float[Array, "B H W"]:
    mean, _ = vae_encode(vae, pixels.astype(jnp.float32) / 127.5 - 1)
    latents = latent_scale * mean.astype(jnp.float32)
    context, added = texts

    def look(noise: tuple[Array, Array]) -> tuple[Array, ...]:
        timestep, key = noise
        noisy = schedule.add_noise(
            latents, standard_normal(key, latents.shape[1:]), jnp.full(len(latents), timestep)
        )
        _, maps = unet.call("attention_maps", noisy, timestep, context, token_weights, added=added)
        return tuple(maps[layer] for layer in _finer(maps, min_map_side))

    maps = [looks.mean(axis=0) for looks in jax.lax.map(look, (timesteps, keys))]
    size = pixels.shape[:3]
    return sum(jax.image.resize(_unit_range(layer), size, "linear") for layer in maps) / len(maps)


def _finer(maps: Sequence[Float[Array, "B h w"]], min_map_side: int) -> list[int]:
    """Layers whose maps have at least ``min_map_side`` positions a side, or the finest."""
    sides = [min(layer.shape[1:]) for layer in maps]
    if not sides:
        raise CatVersionError(
            "this UNet has no cross-attention, so no layer reads the class word. Use a "
            "text-to-image model, or --clipseg."
        )
    least = min(min_map_side, max(sides))
    return [index for index, side in enumerate(sides) if side >= least]


def _unit_range(layer: Float[Array, "B h w"]) -> Float[Array, "B h w"]:
    """Each image's map scaled to 0..1; a flat one becomes 0."""
    low = layer.min(axis=(1, 2), keepdims=True)
    span = layer.max(axis=(1, 2), keepdims=True) - low
    return (layer - low) / jnp.where(span == 0, 1, span)
