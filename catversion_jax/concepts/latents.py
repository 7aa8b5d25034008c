"""A concept's images -> VAE latents, computed once before training.

The encoder's posterior of an image x is a Gaussian with mean mu(x) and standard deviation sigma(x).
Both are cached, times the model's ``latent_scale`` s, so that a training step only draws

    (1)  z = s mu(x) + s sigma(x) n,   n ~ N(0, I)

The flipped image is encoded too: the encoder is not equivariant, so flipped latents would not be
the latents of the flipped image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Bool, Float
from catversion_jax.concepts import ConceptSpec
from catversion_jax.concepts.images import Alpha, Crop, LoadedImage, load_image
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.models.vae import vae_encode
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.batches import full_batches

ENCODE_BATCH = 4
"""One program is compiled whatever a concept's number of images, so that the latents of an image
depend on nothing else."""


@dataclasses.dataclass(frozen=True)
class EncodedConcept:
    """Latents of one concept's M images; axis 1 is (as it is, flipped horizontally). Host arrays.

    Attributes:
      mean: ``[M 2 h w c]`` float32, posterior mean, times ``latent_scale``.
      std: ``[M 2 h w c]`` float32, posterior standard deviation, times ``latent_scale``.
      mask: ``[M 2 h w]`` float32 in [0, 1], share of the object in each latent pixel; 1 without a
        mask.
      time_ids: ``[M 6]`` float32, what Stable Diffusion XL is told of their sizes.
      kept: ``[M V 2 h w 1+c]`` float32, what an inpainting model reads beside the noisy latents for
        each of V areas to be painted anew; None for other models.
    """

    mean: np.ndarray
    std: np.ndarray
    mask: np.ndarray
    time_ids: np.ndarray
    kept: np.ndarray | None = None


def load_concept_images(
    spec: ConceptSpec, *, resolution: int, crop: Crop = "center", alpha: Alpha = "white"
) -> list[LoadedImage]:
    """Decode all images of a concept.

    Raises:
      ConceptError: one or more cannot be used; the message lists all of them.
    """
    images: list[LoadedImage] = []
    problems: list[str] = []
    for source in spec.images:
        try:
            with concept_errors(f"{source.label}: cannot be read"):
                images.append(load_image(source, resolution=resolution, crop=crop, alpha=alpha))
        except ConceptError as error:
            problems.append(str(error))
    if problems:
        raise ConceptError("\n".join(problems))
    return images


def encode_concept(
    images: Sequence[LoadedImage],
    vae: Network,
    *,
    latent_scale: float,
    latent_downsampling: int,
    repainted: Sequence[Bool[np.ndarray, "V R R"]] | None = None,
) -> EncodedConcept:
    """Encode images and their mirror images (equation 1).

    Args:
      images: all of one size, a multiple of ``latent_downsampling``.
      vae: its ``encode`` maps ``[B H W 3]`` to mean and standard deviation ``[B h w c]``.
      latent_scale: the model's factor s.
      latent_downsampling: pixels per latent pixel, 8 for Stable Diffusion.
      repainted: for an inpainting model the areas of each image to be painted anew, see
        :mod:`~catversion_jax.concepts.repainting`.

    Raises:
      ConceptError: no image, or the encoder's output is not finite.
      CatVersionError: the image size does not fit the model.
    """
    if not images:
        raise ConceptError("no image to encode; a concept needs at least one.")
    side = images[0].pixels.shape[0]
    if side % latent_downsampling:
        raise CatVersionError(
            f"resolution={side}: must be a multiple of {latent_downsampling}, the model's latent "
            "downsampling."
        )
    pixels = np.stack(
        [flip for image in images for flip in (image.pixels, image.pixels[:, ::-1])]
    )  # [2M H W 3]
    scale = np.float32(latent_scale)
    mean, std = (
        scale * part.reshape(len(images), 2, *part.shape[1:]) for part in _posterior(vae, pixels)
    )
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise ConceptError(
            "the VAE gives values that are not finite for these images. Check that the model "
            "folder's VAE is intact (some fp16 VAE files overflow; use the float32 file)."
        )
    return EncodedConcept(
        mean,
        std,
        np.stack([_latent_masks(image, latent_downsampling) for image in images]),
        np.array([image.time_ids for image in images], np.float32),
        None if repainted is None else _kept(vae, images, repainted, scale, latent_downsampling),
    )


def _posterior(
    vae: Network, pixels: Float[np.ndarray, "N H W 3"]
) -> tuple[Float[np.ndarray, "N h w c"], Float[np.ndarray, "N h w c"]]:
    """Mean and standard deviation, ``ENCODE_BATCH`` images at a time."""
    chunks = [
        jax.device_get(_encode(vae, pixels[rows]))
        for rows in full_batches(len(pixels), ENCODE_BATCH)
    ]
    mean, std = (np.concatenate(part)[: len(pixels)] for part in zip(*chunks, strict=True))
    return mean, std


def _kept(
    vae: Network,
    images: Sequence[LoadedImage],
    repainted: Sequence[Bool[np.ndarray, "V R R"]],
    scale: np.float32,
    factor: int,
) -> Float[np.ndarray, "M V 2 h w 1+c"]:
    """Equation (1) of ``sampling/inpainting.py`` without the noisy latents."""
    per_image = []
    for image, areas in zip(images, repainted, strict=True):
        both = [flip for area in areas for flip in (area, area[:, ::-1])]  # [2V R R]
        pixels = [image.pixels, image.pixels[:, ::-1]] * len(areas)
        emptied = np.stack([p * ~area[..., None] for p, area in zip(pixels, both, strict=True)])
        mean, _ = _posterior(vae, emptied)
        where = np.stack(both)[:, ::factor, ::factor, None].astype(np.float32)
        kept = np.concatenate([where, scale * mean], axis=-1)
        per_image.append(kept.reshape(len(areas), 2, *kept.shape[1:]))
    return np.stack(per_image)


@jax.jit
def _encode(vae: Network, pixels: Float[Array, "B H W 3"]) -> tuple[Array, Array]:
    mean, std = vae_encode(vae, pixels)
    return mean.astype(jnp.float32), std.astype(jnp.float32)


def _latent_masks(image: LoadedImage, factor: int) -> np.ndarray:
    """``[2 h w]``: the mask's mean over the pixels of each latent pixel, as it is and flipped."""
    height, width = (side // factor for side in image.pixels.shape[:2])
    if image.mask is None:
        return np.ones((2, height, width), np.float32)
    blocks = image.mask.reshape(height, factor, width, factor).mean(axis=(1, 3), dtype=np.float32)
    return np.stack([blocks, blocks[:, ::-1]])
