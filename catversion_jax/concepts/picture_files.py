"""A picture file -> its first frame, upright, whatever the file holds.

Photos and masks come from strangers. Only these formats are opened, because some of Pillow's others
start programs (EPS runs Ghostscript) or are hardly ever tested: AVIF, BMP, GIF, JPEG, JPEG 2000,
PNG, PPM, TGA, TIFF and WebP, and HEIC where ``pillow-heif`` is installed. A file's name decides
nothing. The number of pixels is known from the header and refused before anything is decoded.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.errors import ConceptError

FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""Pillow's names of the formats that may be opened, where this machine has a decoder for them."""

_SMALLER = "Scale it down, for example to 2048 pixels on its longer side."
_NEEDS_PLUGIN = {
    ".heic": "pip install 'catversion-jax[heic]'",
    ".heif": "pip install 'catversion-jax[heic]'",
    ".avif": "pip install -U pillow",
}


@functools.cache
def allowed_formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this machine can decode."""
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_picture(
    file: Path | io.BytesIO, name: str, *, max_megapixels: float
) -> tuple[Image.Image, tuple[str, ...]]:
    """The first frame of a picture file, upright, in the mode of the file.

    Args:
      file: the file or its contents.
      name: what messages call it.
      max_megapixels: most pixels that are decoded, in millions.

    Returns:
      The picture with its ``info`` and ``format``, and what was left out of it, in words.

    Raises:
      ConceptError: no picture of an allowed format, damaged, too large; whatever else goes wrong.
    """
    remedy = ": truncated, damaged or not readable. Replace or remove it."
    with concept_errors(f"{name}: cannot be decoded", remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, and Pillow's own limit on pixels
        try:
            opened = Image.open(file, formats=allowed_formats())
        except UnidentifiedImageError:
            raise ConceptError(f"{name}: {_not_a_picture(name)}") from None
        except Image.DecompressionBombError as error:
            raise ConceptError(f"{name}: too large. {error} {_SMALLER}") from None
        with opened as image:
            _check_size(image, name, max_megapixels)
            image.load()
            return _upright(image), _left_out(image)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as a picture file's header says them; nothing is decoded.

    Raises:
      ConceptError: no picture of an allowed format.
    """
    with (
        concept_errors(f"{path}: cannot be read as a picture"),
        Image.open(path, formats=allowed_formats()) as image,
    ):
        return image.size


def _check_size(image: Image.Image, name: str, max_megapixels: float) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise ConceptError(
            f"{name}: too large: {width} x {height} are {width * height / 1e6:.0f} megapixels, at "
            f"most max_megapixels={max_megapixels:g} are decoded. {_SMALLER}"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:
        turned = image.copy()  # EXIF data that cannot be parsed says nothing about orientation
    turned.info = dict(image.info)
    turned.format = image.format
    return turned


def _left_out(image: Image.Image) -> tuple[str, ...]:
    # The further pictures of a JPEG (MPO) are previews and depth maps of cameras.
    try:
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:
        return ()  # damage behind the first frame
    kind = "the first page of several" if image.format == "TIFF" else "an animation's first frame"
    return (f"only {kind} is used",) if several else ()


def _not_a_picture(name: str) -> str:
    command = _NEEDS_PLUGIN.get(Path(name).suffix.lower())
    if command:
        kind = Path(name).suffix[1:].upper()
        return f"{kind} cannot be read here. Convert it to JPEG or PNG, or: {command}"
    return (
        "is not an image of an allowed format (AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TGA, "
        "TIFF, WebP), or is empty. Replace or remove the file."
    )
