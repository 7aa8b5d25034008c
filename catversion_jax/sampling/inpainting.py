r"""What the UNet of an inpainting model reads beside the noisy latents: where to paint, and what is
kept.

    (1)  input = [c_in x, m, s E(image (1 - M))]

``M`` is the mask at the picture's size, 1 where it is painted anew; ``m`` is every eighth row and
column of it; ``E`` is the mean of the autoencoder's posterior, ``s`` the latent scale. Without a
picture everything is painted anew: M = 1. Source: diffusers' StableDiffusionInpaintPipeline, which
draws from the posterior where this takes its mean, so that a picture depends on its seed only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.concepts.folders import ImageSource
from catversion_jax.concepts.images import decode_photo
from catversion_jax.concepts.mask_values import mask_of
from catversion_jax.concepts.picture_files import read_picture
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.vae import vae_encode
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.sharding import mesh_of, replicated


@dataclasses.dataclass(frozen=True)
class KeptPicture:
    """A picture of which a part is painted anew.

    Attributes:
      image: ``[H W 3]`` uint8.
      mask: ``[H W]`` uint8 of any size, white where it is painted anew.
    """

    image: Int[np.ndarray, "H W 3"]
    mask: Int[np.ndarray, "h w"]

    def __post_init__(self) -> None:
        for name, array, axes in (("image", self.image, 3), ("mask_image", self.mask, 2)):
            colours = array.shape[2:] == (3,) if axes == 3 else True
            if array.dtype != np.uint8 or array.ndim != axes or not colours or not array.size:
                shape = "[height width 3]" if axes == 3 else "[height width]"
                raise CatVersionError(
                    f"{name} of type {array.dtype} and shape {array.shape}: must be uint8 {shape}; "
                    "white in mask_image is painted anew."
                )
        if self.mask.max() < 128:
            raise CatVersionError(
                f"mask_image: its brightest grey is {self.mask.max()} of 255, so nothing would be "
                "painted anew. What is to be painted must be white."
            )

    @classmethod
    def of(
        cls, image: np.ndarray | str | Path | None, mask: np.ndarray | str | Path | None
    ) -> KeptPicture | None:
        """From two arrays or two files; None where neither was given.

        Raises:
          CatVersionError: one is missing, of another kind than the other, or no picture.
        """
        if image is None and mask is None:
            return None
        if isinstance(image, np.ndarray) and isinstance(mask, np.ndarray):
            return cls(image, mask)
        if isinstance(image, str | Path) and isinstance(mask, str | Path):
            return cls.read(image, mask)
        kinds = [
            f"of type {type(one).__name__}" if one is not None else "missing"
            for one in (image, mask)
        ]
        raise CatVersionError(
            f"image {kinds[0]}, mask_image {kinds[1]}: give both, as two files or as two uint8 "
            "arrays; white in mask_image is painted anew."
        )

    @classmethod
    def read(cls, image: str | Path, mask: str | Path) -> KeptPicture:
        """From two files; the mask is read as masks of photos are (``concepts/mask_values.py``).

        Raises:
          CatVersionError: one of them is no picture.
        """
        photo = decode_photo(ImageSource(str(image), Path(image))).picture.convert("RGB")
        grey, _ = read_picture(Path(mask), str(mask), max_megapixels=ImageSource.max_megapixels)
        return cls(np.asarray(photo), np.asarray(mask_of(grey).grey))

    @property
    def sha256(self) -> str:
        """Of both arrays; what a PNG says of the picture it was made from."""
        digest = hashlib.sha256(repr((self.image.shape, self.mask.shape)).encode())
        for array in (self.image, self.mask):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def inpainting_input(
    backbone: Backbone, picture: KeptPicture | None, height: int, width: int
) -> Float[np.ndarray, "h w c"] | None:
    """``m`` and the latents of equation (1) for pictures of so many latent positions; None for
    models that do not inpaint.

    Raises:
      CatVersionError: a picture, and a model that reads none.
    """
    if not backbone.inpaints:
        if picture is not None:
            raise CatVersionError(
                f"image and mask_image: {backbone.name} reads no picture, its UNet has "
                f"{backbone.latent_channels} input channels. Give the inpainting model of the same "
                "family (such as stable-diffusion-inpainting): a concept acts there too if its "
                "text encoder is the same."
            )
        return None
    factor = backbone.latent_downsampling
    size = (width * factor, height * factor)
    if picture is None:
        pixels, mask = np.zeros((*size[::-1], 3), np.float32), np.ones(size[::-1], np.float32)
    else:
        resized = Image.fromarray(picture.image).resize(size, Image.Resampling.LANCZOS)
        grey = Image.fromarray(picture.mask).resize(size, Image.Resampling.LANCZOS)
        mask = (np.asarray(grey, np.float32) / 255 >= 0.5).astype(np.float32)
        # in the order of diffusers' VaeImageProcessor, whose roundings these are
        pixels = (2 * (np.asarray(resized, np.float32) / 255) - 1) * (1 - mask[..., None])
    everywhere = replicated(mesh_of(backbone.vae))
    kept = jax.device_get(_mean(backbone.vae, jax.device_put(pixels[None], everywhere)))[0]
    scaled = np.float32(backbone.latent_scale) * kept
    return np.concatenate([mask[::factor, ::factor, None], scaled], axis=-1)


@jax.jit
def _mean(vae: Network, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
    return vae_encode(vae, pixels)[0].astype(np.float32)
