r"""A map of how much each pixel belongs to the object -> its mask.

    (1)  q_i = mean over the windows W around i of (a_W . I_i + b_W),
         (a_W, b_W) = argmin sum_{j in W} [(a . I_j + b - p_j)^2 + epsilon |a|^2]

The guided filter (He, Sun, Tang: Guided Image Filtering, ECCV 2010, equations 4, 8 and 14 to 16 of
the journal version): map p, blurred and coarse, becomes q, which is linear in the colours I within
a window, so that its edges are the image's. Then Otsu's threshold, then no holes and no crumbs.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from catversion_jax.array_types import Float, Int

EPSILON = 1e-4
"""Of equation (1), for colours in 0..1."""

CRUMB_SHARE = 0.2
"""Parts smaller than this share of the largest part are not the object."""

_OTSU_BINS = 256


def mask_from_map(
    belonging: Float[np.ndarray, "H W"], pixels: Int[np.ndarray, "H W 3"], *, edge_window: float
) -> Int[np.ndarray, "H W"]:
    """The object's mask.

    Args:
      belonging: larger where the object is; any scale.
      pixels: the image, uint8.
      edge_window: side of W in shares of the shorter side; 0 leaves equation (1) out.

    Returns:
      uint8, 255 on the object and 0 elsewhere; all 0 where the map is flat.
    """
    if edge_window:
        window = round(edge_window * min(belonging.shape))
        belonging = guided_filter(belonging, pixels / 255.0, window=window)
    return _without_crumbs_and_holes(belonging > otsu_threshold(belonging)).astype(np.uint8) * 255


def guided_filter(
    belonging: Float[np.ndarray, "H W"],
    guide: Float[np.ndarray, "H W 3"],
    *,
    window: int,
    epsilon: float = EPSILON,
) -> Float[np.ndarray, "H W"]:
    """Equation (1) with windows of ``window`` x ``window`` pixels, made odd; image edges are
    mirrored.
    """
    size = (window | 1, window | 1)
    colour = np.asarray(guide, np.float64)
    target = np.asarray(belonging, np.float64)

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(values, size + (1,) * (values.ndim - 2))

    colour_mean, target_mean = mean(colour), mean(target)
    cross = mean(colour * target[..., None]) - colour_mean * target_mean[..., None]
    products = (colour[..., :, None] * colour[..., None, :]).reshape(*target.shape, 9)
    covariance = mean(products).reshape(*target.shape, 3, 3)
    covariance -= colour_mean[..., :, None] * colour_mean[..., None, :]
    slope = np.linalg.solve(covariance + epsilon * np.eye(3), cross[..., None])[..., 0]
    offset = target_mean - (slope * colour_mean).sum(-1)
    return (mean(slope) * colour).sum(-1) + mean(offset)


def otsu_threshold(values: Float[np.ndarray, "H W"]) -> float:
    """The threshold that maximises the variance between the two sides (Otsu 1979)."""
    counts, edges = np.histogram(values, _OTSU_BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    mean_below = total / np.maximum(below, 1)
    mean_above = (total[-1] - total) / np.maximum(above, 1)
    if values.max() == values.min():
        return float(values.max())
    between = below * above * (mean_below - mean_above) ** 2
    return float(edges[1:][between.argmax()])


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks; 1 where both are empty.

    A pixel above the middle of 0..255 belongs to the object.
    """
    one, other = first > 127, second > 127
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def centred_disk(shape: tuple[int, int], radius: float) -> Int[np.ndarray, "H W"]:
    """A mask made without a model: an ellipse in the middle, ``radius`` in shares of each side."""
    rows, columns = (((np.arange(side) + 0.5) / side - 0.5) ** 2 for side in shape)
    return (rows[:, None] + columns < radius**2).astype(np.uint8) * 255


def _without_crumbs_and_holes(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if count == 0:
        return mask
    areas = np.bincount(parts.ravel())[1:]
    kept = 1 + np.flatnonzero(areas >= CRUMB_SHARE * areas.max())
    return ndimage.binary_fill_holes(np.isin(parts, kept))
