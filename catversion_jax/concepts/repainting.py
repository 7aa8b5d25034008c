r"""What an inpainting model is taught with: each training image with some parts of it taken away.

Its UNet reads beside the noisy latents where to paint and the latents of what is kept, equation (1)
of ``sampling/inpainting.py``. A training image gets ``NUM_AREAS`` areas to be painted anew:

1. the whole image, as in drawing without a picture;
2. a box round the object, where a mask says where that is, with a tenth of the image on each side;
   else as 3;
3. rectangles and ellipses of random size and place, as in diffusers' example of DreamBooth
   inpainting (``random_mask``).

They are drawn once from the concept's seed and the image's place, and encoded once.
"""

from __future__ import annotations

import numpy as np

from catversion_jax.array_types import Bool
from catversion_jax.concepts.images import LoadedImage

NUM_AREAS = 4


def areas_to_repaint(image: LoadedImage, seed: int, place: int) -> Bool[np.ndarray, "V R R"]:
    """The areas of one training image, True where it is painted anew.

    Args:
      image: the image and, if it has one, its mask.
      seed: of the concept.
      place: of the image in the concept.
    """
    rng = np.random.default_rng((seed, place))
    side = image.pixels.shape[0]
    areas = [np.ones((side, side), bool)]
    if image.mask is not None and (image.mask >= 0.5).any():
        areas.append(_box_round(image.mask >= 0.5))
    while len(areas) < NUM_AREAS:
        areas.append(_random_area(rng, side))
    return np.stack(areas)


def _box_round(area: Bool[np.ndarray, "R R"]) -> Bool[np.ndarray, "R R"]:
    side, box = len(area), np.zeros_like(area)
    margin = side // 10
    (top, bottom), (left, right) = (
        (filled[0] - margin, filled[-1] + 1 + margin)
        for filled in (np.flatnonzero(area.any(axis)) for axis in (1, 0))
    )
    box[max(top, 0) : bottom, max(left, 0) : right] = True
    return box


def _random_area(rng: np.random.Generator, side: int) -> Bool[np.ndarray, "R R"]:
    height, width = (rng.integers(side // 4, side, endpoint=True) for _ in range(2))
    top, left = (
        rng.integers(side - height, endpoint=True),
        rng.integers(side - width, endpoint=True),
    )
    rows, columns = np.indices((side, side), dtype=np.float32) + 0.5
    down = (rows - top - height / 2) / (height / 2)
    across = (columns - left - width / 2) / (width / 2)
    if rng.integers(2):
        return down**2 + across**2 <= 1
    return (abs(down) <= 1) & (abs(across) <= 1)
