"""What a mask file says: which pixels are the object.

Masks come in the dialects of many programs:

| file                                    | object                                        |
|-----------------------------------------|-----------------------------------------------|
| has transparency (a cut-out)            | what is opaque, whatever its colours          |
| indexed colours (label maps)            | all but black, or all but index 0             |
| two values, such as 0 and 1             | the larger one                                |
| greyscale                               | white; grey is partly the object              |

``mask_polarity=black`` says that black is the object in the last three.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from catversion_jax.concepts.colour import eight_bits, transparency

EMPTY_SHARE = 0.01
"""Masks of less of the image count as empty."""

INSIDE = 128
"""Least grey of a mask's object."""

_BLACK = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask as it was drawn: 8-bit greyscale, white on the object.

    ``fault`` says why it is hardly meant so; None where nothing is odd.
    """

    grey: Image.Image
    fault: str | None


def mask_of(image: Image.Image, *, black_is_object: bool = False) -> Mask:
    """Read a mask from a decoded mask file."""
    image, _ = eight_bits(image)
    grey = transparency(image)
    if grey is None:
        grey = _indexed(image) if image.mode == "P" else _two_valued(image.convert("L"))
        if black_is_object:
            grey = grey.point([255 - value for value in range(256)])
    return Mask(grey, mask_fault(grey))


def mask_fault(grey: Image.Image) -> str | None:
    """Why a mask is probably not meant as it is drawn, in words that follow its name."""
    values = np.asarray(grey)
    brightest, object_ = int(values.max(initial=0)), values >= INSIDE
    if brightest == 0:
        return "is empty: nothing in it is white"
    if brightest < INSIDE:
        return f"is never white: its brightest grey is {brightest} of 255"
    if object_.mean() < EMPTY_SHARE:
        return f"is nearly empty: {100 * object_.mean():.2g} % of it are white"
    if object_.all():
        return "is white everywhere"
    if all(edge.all() for edge in (object_[0], object_[-1], object_[:, 0], object_[:, -1])):
        return "is white along the whole border: it looks inverted"
    return None


def _indexed(image: Image.Image) -> Image.Image:
    """A label map: black is the background where the palette has it, else index 0."""
    palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    indices = np.asarray(image)
    used = [int(index) for index in np.unique(indices)]
    colours = {i: tuple(palette[i].tolist()) if i < len(palette) else _BLACK for i in used}
    if all(red == green == blue for red, green, blue in colours.values()):
        return _two_valued(image.convert("L"))  # a greyscale picture that was saved with a palette
    black = [index for index, colour in colours.items() if colour == _BLACK]
    inside = ~np.isin(indices, black or [0])
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _two_valued(grey: Image.Image) -> Image.Image:
    """A mask of two values made black and white; any other as it is."""
    values = [value for value, count in enumerate(grey.histogram()) if count]
    if len(values) != 2:
        return grey
    return grey.point([255 if value >= values[1] else 0 for value in range(256)])
