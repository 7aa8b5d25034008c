"""Image against text score over the scale of the concepts: what their strength trades.

Each point is the mean over concepts with the first seed of every prompt, drawn with all concepts at
one scale. ``Learned.scaled`` says what a scale does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from catversion_jax.errors import CatVersionError, shown
from catversion_jax.evaluation.scores import Scores, SubjectScores

MOST_SCALES = 20


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """Scores at one scale, by concept.

    Attributes:
      scale: strength of the concepts.
      scores: of each concept.
    """

    scale: float
    scores: Mapping[str, Scores]

    @property
    def image(self) -> float | None:
        """Mean image score, of the object alone where every concept has it."""
        masked = self._mean("image_alignment_masked")
        return self._mean("image_alignment") if masked is None else masked

    @property
    def text(self) -> float | None:
        """Mean text score, against the prompt without the concept word."""
        return self._mean("text_alignment_edit")

    def _mean(self, metric: str) -> float | None:
        values = [getattr(scores, metric) for scores in self.scores.values()]
        return None if not values or None in values else float(sum(values) / len(values))


def frontier_points(scored: Mapping[float, Sequence[SubjectScores]]) -> list[FrontierPoint]:
    """The points of a frontier by scale, smallest first."""
    return [
        FrontierPoint(scale, {subject.name: subject.first_seed for subject in subjects})
        for scale, subjects in sorted(scored.items())
    ]


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Scales in order, each once.

    Raises:
      CatVersionError: no numbers above 0, or too many.
    """
    if not isinstance(scales, Sequence) or isinstance(scales, str | bytes):
        raise CatVersionError(f"scales={shown(scales)}: must be a list, such as [0.4, 0.7, 1].")
    for scale in scales:
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not (is_number and math.isfinite(scale) and 0 < scale <= 10):
            raise CatVersionError(
                f"scales: {shown(scale)}: must be numbers above 0 and at most 10, such as "
                "0.4,0.6,0.8,1."
            )
    if len(scales) > MOST_SCALES:
        raise CatVersionError(f"scales: {len(scales)} of them: must be at most {MOST_SCALES}.")
    return tuple(sorted({float(scale) for scale in scales}))
