"""Unit vectors of one concept's pictures and photos, whole and of the object alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from catversion_jax.array_types import Float


@dataclasses.dataclass(frozen=True)
class View:
    """One way of looking: whole pictures, or objects alone.

    Attributes:
      drawn: of the concept's pictures.
      photos: what they are compared with: held-out photos where there are any, else training
        images.
      trained: training images.
    """

    drawn: Float[np.ndarray, "n E"]
    photos: Float[np.ndarray, "r E"]
    trained: Float[np.ndarray, "t E"]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a gallery compares: the vectors of its judge.

    Attributes:
      judge: ``"DINOv2"`` or ``"judge"`` where one is given, else ``"CLIP"``.
      whole: of whole pictures.
      masked: of those that have a mask with an object in it, without their background.
      held_out: whether ``photos`` are not ``trained``.
    """

    judge: str
    whole: View
    masked: View
    held_out: bool
