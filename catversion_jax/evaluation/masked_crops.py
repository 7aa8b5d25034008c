"""The object alone: what the masked score looks at.

    (1)  x' = m x + (1 - m) fill,   fill the embedder's mean colour
    (2)  crop = the square around m's bounding box, its longer side plus 10 % on each end

Where the square leaves the image it shows ``fill`` too: at the embedder's input that is exactly
zero.
"""

from __future__ import annotations

import numpy as np

from catversion_jax.array_types import Float, Int

MARGIN = 0.1


def masked_crop(
    image: Int[np.ndarray, "H W 3"],
    mask: Int[np.ndarray, "H W"],
    fill: Float[np.ndarray, " 3"],
) -> Int[np.ndarray, "S S 3"] | None:
    """Equations (1) and (2); None when the mask is empty.

    Args:
      image: uint8.
      mask: uint8, 255 on the object; values between blend. What is at least 128 counts as object
        for the bounding box.
      fill: mean colour within 0..1.
    """
    rows, columns = np.nonzero(mask >= 128)
    if not len(rows):
        return None
    weight = (mask.astype(np.float64) / 255.0)[..., None]
    blended = weight * image + (1.0 - weight) * 255.0 * fill
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    longer = max(bottom - top, right - left)
    side = longer + 2 * round(MARGIN * longer)
    # centred; where it cannot be, the odd pixel goes to the bottom right
    y0, x0 = top - (side - (bottom - top)) // 2, left - (side - (right - left)) // 2
    crop = np.broadcast_to(255.0 * fill, (side, side, 3)).copy()
    height, width = mask.shape
    inside_y = slice(max(y0, 0), min(y0 + side, height))
    inside_x = slice(max(x0, 0), min(x0 + side, width))
    crop[inside_y.start - y0 : inside_y.stop - y0, inside_x.start - x0 : inside_x.stop - x0] = (
        blended[inside_y, inside_x]
    )
    return np.rint(crop).astype(np.uint8)
