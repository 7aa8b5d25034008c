"""When a concept fails the quality gate of ``catversion evaluate --gate``: names and defaults."""

from __future__ import annotations

import dataclasses
import math

from catversion_jax.errors import CatVersionError, shown


@dataclasses.dataclass(frozen=True)
class GateSettings:
    """Thresholds of the gate; a concept fails where it is on the wrong side of one.

    Attributes:
      rank1: least share of pictures that are nearest to a photo of their own concept, among the
        photos of its class. By default most of them: below that a picture rather shows another one.
      copies: largest share of pictures nearer to a training photo than the photos are to each
        other. By default a little more than preset=quality has in the study (.22), and well below
        DreamBooth, the method known for memorising (.42).
      text_loss: how far the text score may fall below the plain model's on the same prompts and
        seeds. By default the study's own goal for CatVersion.
    """

    rank1: float = 0.5
    copies: float = 0.25
    text_loss: float = 0.05

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and 0 <= value <= 1):
                raise CatVersionError(
                    f"gate_{field.name}={shown(value)}: must be within 0..1, by default "
                    f"{field.default}."
                )
