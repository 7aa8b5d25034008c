"""Object masks as files beside the images, named so that the concept reader finds them.

What the user gave wins: a mask file stays, and an image's own transparency is its mask. The same
files serve masked training and the masked image score.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from catversion_jax.array_types import Int
from catversion_jax.concepts import ConceptSpec, ImageSource
from catversion_jax.concepts.folders import MaskPolarity
from catversion_jax.concepts.images import decode_upright
from catversion_jax.concepts.mask_values import INSIDE
from catversion_jax.concepts.quarantine import concept_errors
from catversion_jax.errors import ConceptError
from catversion_jax.runtime.atomic_files import write_atomically

Origin = Literal["given", "alpha", "made"]
MaskMaker = Callable[[Int[np.ndarray, "n H W 3"], Sequence[str]], Int[np.ndarray, "n H W"]]

FULL_SHARE = 0.95
"""Masks of more of the image count as full."""

THUMBNAIL_SIDE = 128
_CUT_OUT_BACKGROUND = (255, 0, 255)


@dataclasses.dataclass(frozen=True)
class ObjectMask:
    """One image's mask, upright and at the image's size.

    Attributes:
      source: the image.
      picture: RGB.
      mask: 8-bit greyscale, white on the object.
      origin: where the mask comes from.
    """

    source: ImageSource
    picture: Image.Image
    mask: Image.Image
    origin: Origin

    @property
    def area(self) -> float:
        """Share of the image that is object."""
        return float((np.asarray(self.mask) >= INSIDE).mean())


def object_masks(
    spec: ConceptSpec, make: MaskMaker, *, resolution: int, replace: bool = False
) -> list[ObjectMask]:
    """The masks of a concept's images: given, from alpha, or made.

    Args:
      spec: the concept.
      make: makes the masks that are missing, from square uint8 pixels and base classes.
      resolution: side of those pixels.
      replace: make the masks of all images, whatever is there.

    Raises:
      ConceptError: images or masks that cannot be read; the message lists all of them.
    """
    found: list[ObjectMask | None] = []
    pictures, problems = [], []
    for source in spec.images:
        try:
            with concept_errors(f"{source.label}: cannot be read"):
                picture, given, origin = _read(source)
        except ConceptError as error:
            problems.append(str(error))
            continue
        pictures.append(picture)
        keep = given is not None and not replace
        found.append(ObjectMask(source, picture, given, origin) if given and keep else None)
    if problems:
        raise ConceptError("\n".join(problems))
    missing = [index for index, mask in enumerate(found) if mask is None]
    if missing:
        # the whole picture, bent to a square: a crop would leave parts without a mask
        square = [
            pictures[i].resize((resolution, resolution), Image.Resampling.BICUBIC) for i in missing
        ]
        masks = make(
            np.stack([np.asarray(image) for image in square]), [spec.base_class] * len(missing)
        )
        for index, mask in zip(missing, masks, strict=True):
            fitted = _fitted(mask, pictures[index].size)
            found[index] = ObjectMask(spec.images[index], pictures[index], fitted, "made")
    return [mask for mask in found if mask is not None]


def _read(source: ImageSource) -> tuple[Image.Image, Image.Image | None, Origin]:
    """The upright picture, and the mask the user gave with it."""
    image = decode_upright(source)
    if image.mask is not None:
        return image.picture, image.mask, "given"
    return image.picture, image.transparency, "alpha"


def _fitted(mask: Int[np.ndarray, "H W"], size: tuple[int, int]) -> Image.Image:
    """A square mask at the size of its image, with smooth edges and two values."""
    grey = Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR)
    return grey.point([255 if value >= INSIDE else 0 for value in range(256)])


def mask_paths(spec: ConceptSpec, *, replace: bool = False) -> list[Path]:
    """Where each image's mask is or belongs: the file that is there, else ``1.mask.png`` beside
    ``1.png``; ``1.png.mask.png`` where ``1.jpg`` lies there too, or several images share a mask
    that is replaced.

    Raises:
      ConceptError: images that are no files, or, to ``replace`` them, masks that are no PNG files.
    """
    paths = []
    for source in spec.images:
        if source.path is None:
            raise ConceptError(
                f"{spec.name}: its images are rows of a dataset, with no folder for masks. Save "
                "them as files, or give each image its alpha channel."
            )
        shared = sum(other.mask == source.mask for other in spec.images) > 1
        if source.mask is not None and not (replace and shared):
            if replace and source.mask.suffix.lower() != ".png":
                raise ConceptError(
                    f"{source.mask}: masks are written as PNG only. Remove this mask, then make "
                    "one again."
                )
            paths.append(source.mask)
            continue
        stem = source.path.with_suffix("")
        twins = [s for s in spec.images if s.path is not None and s.path.with_suffix("") == stem]
        named_after = stem if len(twins) == 1 and source.mask is None else source.path
        paths.append(named_after.with_name(f"{named_after.name}.mask.png"))
    return paths


def write_mask(path: Path, mask: Image.Image, polarity: MaskPolarity | None = None) -> None:
    """Write one mask atomically.

    Args:
      path: the file.
      mask: white on the object.
      polarity: what the object is in the file, as its reader will be told; None for white.

    Raises:
      CatVersionError: the file cannot be written.
    """
    buffer = io.BytesIO()
    (ImageOps.invert(mask) if polarity == "black" else mask).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def thumbnails(mask: ObjectMask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, mask and cut-out as squares to look at; the cut-out's background is magenta."""
    backdrop = Image.new("RGB", mask.picture.size, _CUT_OUT_BACKGROUND)
    cut_out = Image.composite(mask.picture, backdrop, mask.mask)
    shown = [mask.picture, mask.mask.convert("RGB"), cut_out]
    enlarges = max(mask.picture.size) <= THUMBNAIL_SIDE
    method = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
    small = [
        np.asarray(ImageOps.pad(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), method, (128, 128, 128)))
        for image in shown
    ]
    return small[0], small[1], small[2]
