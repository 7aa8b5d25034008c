"""How images are drawn: names and defaults of the sampling options, written once."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from catversion_jax.errors import CatVersionError, shown

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm")
MAX_SIDE = 8192
"""Most pixels of a drawn image's side: more is a slip of the keyboard, and no memory holds it."""
MAX_BATCH_SIZE = 4096
MAX_IMAGES_PER_PROMPT = 1000
"""Most seeds of one prompt in one call, all of which are one page."""
MAX_IMAGES = 1_000_000
"""Most images of one call."""
_WHOLE_NUMBERS = ("num_inference_steps", "height", "width", "batch_size")
KARRAS_SAMPLERS = ("euler", "dpmsolver++")


@dataclasses.dataclass(frozen=True)
class DrawingDefaults:
    """How a model is drawn where the user does not say; as diffusers' StableDiffusionPipeline does,
    unless the model was made to be drawn otherwise (``diffusion/drawing_defaults.py``).

    ``because`` says what makes it so, and is empty for the usual ones.
    """

    sampler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    because: str = ""


USUAL = DrawingDefaults()
USUAL_GRIDS = DrawingDefaults("dpmsolver++", 25, 7.5)
"""Of sample grids while training, and of the evaluation after it."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to draw; the same for every image of a call.

    ``sampler``, ``num_inference_steps``, ``guidance_scale``, ``height`` and ``width`` of None are
    the model's own. ``batch_size`` images are denoised
    together on each device; an image's bits depend on it (another compiled program), but not on the
    other images. None: 1 on CPU, else 4.
    """

    sampler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    eta: float = 0.0
    karras: bool | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for kind, rule, names in (
            (numbers.Integral, "a whole number", _WHOLE_NUMBERS),
            (numbers.Real, "a number", ("guidance_scale", "eta")),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                    raise CatVersionError(f"{name}={shown(value)}: must be {rule}.")
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size, MAX_BATCH_SIZE)
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side > MAX_SIDE:
                raise CatVersionError(f"{name}={side}: must be at most {MAX_SIDE} pixels.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise CatVersionError(
                f"guidance_scale={self.guidance_scale}: must be a finite number; 7.5 is usual."
            )

    def over(self, defaults: DrawingDefaults) -> SamplingSettings:
        """These settings, and the model's own sampler, steps and guidance where they have none."""
        given = dataclasses.asdict(defaults)
        missing = {name: v for name, v in given.items() if getattr(self, name, v) is None}
        return dataclasses.replace(self, **missing)


def grid_settings(
    num_inference_steps: int | None, guidance_scale: float | None, model: DrawingDefaults
) -> SamplingSettings:
    """How sample grids are drawn: fast, unless the model was made for another way."""
    defaults = model if model.because else USUAL_GRIDS
    given = SamplingSettings(None, num_inference_steps, guidance_scale)
    return given.over(defaults)


def check_count(name: str, count: int, most: int) -> None:
    """Make sure that a number of things is within 1..most; ``name`` may be an argument's.

    Raises:
      CatVersionError: it is not.
    """
    value = f"{name} {count}" if name.startswith("--") else f"{name}={count}"
    if count < 1:
        raise CatVersionError(f"{value}: must be at least 1.")
    if count > most:
        raise CatVersionError(f"{value}: must be at most {most}.")


def sampling_settings(**given: Any) -> SamplingSettings:
    """The settings that are not None, over the defaults.

    Raises:
      CatVersionError: a setting that cannot be.
    """
    return SamplingSettings(**{name: value for name, value in given.items() if value is not None})
