"""One image file -> square float32 pixels in [-1, 1], upright, opaque, with its mask in the same
geometry.

The order matters: orientation first (the photo as its owner sees it, which is what a mask was drawn
on), then 8 bits per channel, then transparency onto white, then the square. Compositing before
resizing keeps the hidden colours under transparent pixels from bleeding into the edge.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from catversion_jax.concepts import ImageSource
from catversion_jax.errors import ConceptError

Crop = Literal["center", "squash"]
Alpha = Literal["white", "mask"]

_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_WIDE_MODES = ("I", "F")
# What PIL raises on malformed or unsupported files besides OSError.
_DECODER_ERRORS = (
    SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError, RuntimeError,
    struct.error,
)  # fmt: skip
_HEIF_SUFFIXES = (".heic", ".heif")
# A mask saved at another size than its image must at least have its shape, to this relative
# accuracy.
_ASPECT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class LoadedImage:
    """One training image.

    Attributes:
      pixels: ``[R R 3]`` float32 in [-1, 1].
      mask: ``[R R]`` float32 in [0, 1], 1 on the object, or None.
      label: the source's label, for messages.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    label: str = ""


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
    opaque, _, mask = decode_upright(source, alpha=alpha)
    box = _square(opaque.size) if crop == "center" else None
    size = (resolution, resolution)
    pixels = (
        np.asarray(opaque.resize(size, Image.Resampling.BICUBIC, box=box), np.float32) / 127.5 - 1.0
    )
    if mask is None:
        return LoadedImage(pixels, None, source.label)
    # A box filter is the exact share of the object in each pixel and never leaves [0, 1].
    small = mask.resize(size, Image.Resampling.BOX, box=box)
    return LoadedImage(pixels, np.asarray(small, np.float32) / 255.0, source.label)


def decode_upright(
    source: ImageSource, *, alpha: Alpha = "white"
) -> tuple[Image.Image, Image.Image | None, Image.Image | None]:
    """The first frame at full size: RGB on white, its alpha channel, its mask (8-bit greyscale), or
    None each.

    Raises:
      ConceptError: unreadable, truncated or too large; or the mask does not belong to the image.
    """
    if source.data is not None:
        opaque, transparency = _decode(io.BytesIO(source.data), source.label, _WHITE)
    elif source.path is not None:
        opaque, transparency = _decode(source.path, str(source.path), _WHITE)
    else:
        raise ConceptError(
            f"{source.label}: has neither a path nor data; this entry cannot be read."
        )
    if source.mask is not None:
        return opaque, transparency, _read_mask(source.mask, source, opaque.size)
    return opaque, transparency, transparency if alpha == "mask" else None


def _decode(
    file: Path | io.BytesIO, name: str, background: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image | None]:
    """Upright RGB on ``background``, and the alpha channel when the image has transparency."""
    try:
        with warnings.catch_warnings():
            # Odd metadata warns, and images above PIL's limit do (refused from twice that on): both
            # are fine.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                return _flatten(_upright(image), background)
    except Image.DecompressionBombError as error:
        raise ConceptError(
            f"{name}: too large to be decoded safely. {error} Scale it down, for example to 2048 "
            "pixels on its longer side."
        ) from None
    except UnidentifiedImageError:
        raise ConceptError(f"{name}: {_not_an_image(name)}") from None
    except (OSError, *_DECODER_ERRORS) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConceptError(
            f"{name}: cannot be decoded ({reason}): truncated, damaged or not readable. Replace or "
            "remove it."
        ) from error


def _not_an_image(name: str) -> str:
    if name.lower().endswith(_HEIF_SUFFIXES):
        return "HEIC cannot be read here. Convert it to JPEG or PNG."
    return "is not an image any decoder here understands, or is empty. Replace or remove the file."


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image  # an EXIF block that cannot be parsed says nothing about orientation


def _flatten(
    image: Image.Image, background: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image | None]:
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    return Image.composite(
        rgba.convert("RGB"), Image.new("RGB", rgba.size, background), alpha
    ), alpha


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale scaled to 8 bits; PIL's own conversion clips instead."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(_round_to_bytes(np.asarray(image, np.float64) / 65535.0))
    if image.mode in _WIDE_MODES:
        values = np.asarray(image, np.float64)
        # Integers of this mode come from 16-bit files; floats are in [0, 1] or already in [0, 255].
        top = 65535.0 if image.mode == "I" else 255.0 if values.max(initial=0.0) > 1.0 else 1.0
        return Image.fromarray(_round_to_bytes(np.nan_to_num(values) / top))
    return image


def _round_to_bytes(unit: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(unit * 255.0), 0, 255).astype(np.uint8)


def _square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred square, as (left, upper, right, lower); exact to half a pixel."""
    width, height = size
    side = min(size)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def _read_mask(path: Path, source: ImageSource, size: tuple[int, int]) -> Image.Image:
    """The mask as 8-bit greyscale, at the size of the upright image."""
    grey = _decode(path, str(path), _BLACK)[0].convert("L")
    if grey.size == size:
        return grey
    (width, height), (mask_width, mask_height) = size, grey.size
    if abs(width * mask_height - height * mask_width) > _ASPECT_TOLERANCE * width * mask_height:
        raise ConceptError(
            f"{path}: the mask is {mask_width} x {mask_height}, its image {source.label} is "
            f"{width} x {height} (upright). A mask must have the shape of its image; redraw or "
            "remove it."
        )
    return grey.resize(size, Image.Resampling.NEAREST)
