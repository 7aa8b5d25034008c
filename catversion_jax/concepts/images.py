"""One image file -> square float32 pixels in [-1, 1], upright, opaque, in sRGB; its mask in the
same geometry.

The order matters: orientation first (the photo as its owner sees it, which is what a mask was drawn
on), then 8 bits per channel and sRGB, then transparency onto white, then the square.
:func:`decode_photo` and :func:`decode_mask` are the only readers of photos and masks.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from catversion_jax.concepts.colour import Flattened, flattened
from catversion_jax.concepts.folders import ImageSource
from catversion_jax.concepts.mask_values import Mask, mask_fault, mask_of
from catversion_jax.concepts.picture_files import read_picture
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.errors import ConceptError

Crop = Literal["center", "squash"]
Alpha = Literal["white", "mask"]

_WHITE = (255, 255, 255)
# A mask saved at another size than its image must at least have its shape, to this relative
# accuracy.
_ASPECT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class UprightImage:
    """One image at full size.

    Attributes:
      picture: RGB on white.
      transparency: its alpha channel, 8-bit greyscale; None where all of it is opaque.
      mask: its object mask, 8-bit greyscale, white on the object; None where it has none.
      mask_fault: why that mask is hardly meant so; None where nothing is odd, or where
        ``mask_polarity`` says that it is meant.
      notes: what was done to it.
      warnings: what may be wrong with it.
    """

    picture: Image.Image
    transparency: Image.Image | None
    mask: Image.Image | None
    mask_fault: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoadedImage:
    """One training image.

    Attributes:
      pixels: ``[R R 3]`` float32 in [-1, 1].
      mask: ``[R R]`` float32 in [0, 1], 1 on the object, or None.
      label: the source's label, for messages.
      mask_fault: why the mask is hardly meant so, as in :class:`UprightImage`.
      warnings: what may be wrong with the image.
      time_ids: what Stable Diffusion XL is told of its size, see :func:`size_conditions`.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    label: str = ""
    mask_fault: str | None = None
    warnings: tuple[str, ...] = ()
    time_ids: tuple[int, ...] = (0,) * 6

    @property
    def picture(self) -> np.ndarray:
        """The pixels as uint8 ``[resolution resolution 3]``, for people and other networks."""
        return np.round((self.pixels + 1) * 127.5).astype(np.uint8)


def load_image(
    source: ImageSource, *, resolution: int, crop: Crop = "center", alpha: Alpha = "white"
) -> LoadedImage:
    """Read, orient, flatten and crop one image and its mask.

    Args:
      source: the file or encoded bytes.
      resolution: side of the result in pixels.
      crop: ``center`` keeps the shape and cuts the longer side; ``squash`` keeps everything and
        bends the shape (the authors' released code).
      alpha: transparency is composited on white; ``mask`` also makes it the mask where no mask file
        exists.

    Raises:
      ConceptError: unreadable, truncated or too large; or the mask does not belong to the image.
    """
    image = decode_upright(source, alpha=alpha)
    picture, mask, fault = image.picture, image.mask, image.mask_fault
    box = _square(picture.size) if crop == "center" else None
    size = (resolution, resolution)
    time_ids = size_conditions(picture.size, resolution=resolution, crop=crop)
    with concept_errors(f"{source.label}: cannot be scaled to {resolution} pixels"):
        resized = picture.resize(size, Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(resized, np.float32) / 127.5 - 1.0
        if mask is None:
            return LoadedImage(
                pixels, None, source.label, warnings=image.warnings, time_ids=time_ids
            )
        # A box filter is the exact share of the object in each pixel and never leaves [0, 1].
        small = np.asarray(mask.resize(size, Image.Resampling.BOX, box=box), np.float32) / 255.0
    if fault is None and source.mask_polarity is None and not small.any():
        fault = "is empty within the centre square that is trained"
    return LoadedImage(pixels, small, source.label, fault, image.warnings, time_ids)


def decode_upright(source: ImageSource, *, alpha: Alpha = "white") -> UprightImage:
    """One image and its mask at full size.

    Args:
      source: the file or encoded bytes.
      alpha: ``mask`` takes transparency as the mask where no mask file exists.

    Raises:
      ConceptError: unreadable, truncated or too large; or the mask does not belong to the image.
    """
    photo = decode_photo(source)
    mask = decode_mask(source)
    grey, fault = photo.transparency if alpha == "mask" else None, None
    if mask is not None:
        grey, fault = _at_size(mask.grey, source, photo.picture.size), mask.fault
    elif grey is not None:
        fault = mask_fault(grey)
    return UprightImage(
        photo.picture,
        photo.transparency,
        grey,
        fault if source.mask_polarity is None else None,
        photo.notes,
        photo.warnings,
    )


def decode_photo(source: ImageSource) -> Flattened:
    """The photo at full size: first frame, upright, sRGB, on white.

    Raises:
      ConceptError: unreadable, truncated or too large.
    """
    file: Path | io.BytesIO
    if source.data is not None:
        file, name = io.BytesIO(source.data), source.label
    elif source.path is not None:
        file, name = source.path, str(source.path)
    else:
        raise ConceptError(
            f"{source.label}: has neither a path nor data; this entry cannot be read."
        )
    image, left_out = read_picture(file, name, max_megapixels=source.max_megapixels)
    with concept_errors(f"{name}: its colours cannot be read", ". Save it as an RGB PNG or JPEG."):
        photo = flattened(image, _WHITE)
    return dataclasses.replace(photo, notes=(*photo.notes, *left_out))


def decode_mask(source: ImageSource) -> Mask | None:
    """The mask file of an image at the mask's own size; None where it has none.

    Raises:
      ConceptError: unreadable, truncated or too large.
    """
    if source.mask is None:
        return None
    image, _ = read_picture(source.mask, str(source.mask), max_megapixels=source.max_megapixels)
    with concept_errors(f"{source.mask}: is no mask", ". Save it as a greyscale PNG."):
        return mask_of(image, black_is_object=source.mask_polarity == "black")


def size_conditions(
    size: tuple[int, int], *, resolution: int, crop: Crop = "center"
) -> tuple[int, ...]:
    """What Stable Diffusion XL is told of a training image, in pixels: its height and width, top
    and left of the crop once its shorter side has ``resolution`` pixels, and the height and width
    of the result. As in diffusers' ``train_text_to_image_sdxl.py``.

    Args:
      size: width and height of the upright image.
      resolution: side of the result.
      crop: as for :func:`load_image`; without a crop its corner is 0.
    """
    width, height = size
    top = left = 0
    if crop == "center":
        scaled = (int(resolution * side / min(size)) for side in (height, width))
        top, left = (round((side - resolution) / 2) for side in scaled)
    return (height, width, top, left, resolution, resolution)


def _square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred square, as (left, upper, right, lower); exact to half a pixel."""
    width, height = size
    side = min(size)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _at_size(grey: Image.Image, source: ImageSource, size: tuple[int, int]) -> Image.Image:
    """The mask at the size of its upright image."""
    if grey.size == size:
        return grey
    (width, height), (mask_width, mask_height) = size, grey.size
    if abs(width * mask_height - height * mask_width) > _ASPECT_TOLERANCE * width * mask_height:
        raise ConceptError(
            f"{source.mask}: the mask is {mask_width} x {mask_height}, its image {source.label} is "
            f"{width} x {height} (upright). A mask must have the shape of its image; redraw or "
            "remove it."
        )
    return grey.resize(size, Image.Resampling.NEAREST)
