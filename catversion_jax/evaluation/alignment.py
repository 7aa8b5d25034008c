"""The scores of one concept's images, from unit embeddings (CLIP's, or DINO's where said).

    (1)  image alignment  I = mean over generated x references of cos(g, r)
    (2)  text alignment   T = mean over generated of cos(g, text)
    (3)  overall            = sqrt(I T),   0 where either is not positive
    (4)  copy check       n = max over references of cos(g, r), flagged above the highest cosine
                              between two different training images
    (5)  drift              = mean over pairs of 1 - cos(image with the concept, plain image)

(1)-(3) are the paper's; (1) also on masked crops, images without a mask left out.
"""

from __future__ import annotations

import math

import numpy as np

from catversion_jax.array_types import Float


def mean_pairwise_cosine(
    left: Float[np.ndarray, "A E"], right: Float[np.ndarray, "B E"]
) -> float | None:
    """Equation (1) of unit vectors; None where one side is empty."""
    if not len(left) or not len(right):
        return None
    return float((left.astype(np.float64) @ right.astype(np.float64).T).mean())


def among_themselves(vectors: Float[np.ndarray, "A E"]) -> float | None:
    """Mean cosine of different images of one set: what real images of a concept reach."""
    pairs = _different_pairs(vectors)
    return float(pairs.mean()) if len(pairs) else None


def copy_limit(references: Float[np.ndarray, "B E"]) -> float | None:
    """The highest cosine between two training images; None with fewer than two."""
    pairs = _different_pairs(references)
    return float(pairs.max()) if len(pairs) else None


def nearest_reference(
    generated: Float[np.ndarray, "A E"], references: Float[np.ndarray, "B E"]
) -> Float[np.ndarray, " A"]:
    """Equation (4) for every generated image."""
    return (generated.astype(np.float64) @ references.astype(np.float64).T).max(axis=1)


def mean_nearest_cosine(
    generated: Float[np.ndarray, "A E"], references: Float[np.ndarray, "B E"]
) -> float | None:
    """Mean of equation (4) over the generated images; None where one side is empty."""
    if not len(generated) or not len(references):
        return None
    return float(nearest_reference(generated, references).mean())


def matched_cosines(
    left: Float[np.ndarray, "A E"], right: Float[np.ndarray, "A E"]
) -> Float[np.ndarray, " A"]:
    """Cosine row by row, as (2) and (5) need it."""
    return (left.astype(np.float64) * right.astype(np.float64)).sum(axis=1)


def overall(image_alignment: float | None, text_alignment: float | None) -> float | None:
    """Equation (3); None where a score is missing."""
    if image_alignment is None or text_alignment is None:
        return None
    return math.sqrt(max(image_alignment, 0.0) * max(text_alignment, 0.0))


def _different_pairs(vectors: Float[np.ndarray, "A E"]) -> Float[np.ndarray, " pairs"]:
    wide = vectors.astype(np.float64)
    return (wide @ wide.T)[np.triu_indices(len(wide), k=1)]
