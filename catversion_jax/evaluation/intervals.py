"""How sure a mean over concepts is: the percentile bootstrap (Efron 1979).

Concepts, not images, are resampled: images of one concept share its luck. For a difference of two
methods hand over the concepts' differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats

from catversion_jax.errors import CatVersionError

NUM_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over concepts with its bootstrap interval; the same values give the same digits.

    Args:
      values: one number per concept, at least two.
      confidence: for instance 0.95.
      seed: of the resampling.

    Raises:
      CatVersionError: fewer than two values, numbers that are not finite, or no confidence.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or len(numbers) < 2 or not np.isfinite(numbers).all():
        raise CatVersionError(
            f"values={list(values)!r}: an interval needs at least two finite numbers, one per "
            "concept."
        )
    if not 0 < confidence < 1:
        raise CatVersionError(f"confidence={confidence}: must be between 0 and 1, usually 0.95.")
    found = scipy.stats.bootstrap(
        (numbers,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(numbers.mean()), float(found.low), float(found.high))
