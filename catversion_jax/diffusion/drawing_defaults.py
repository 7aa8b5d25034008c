"""How a model is drawn where nobody says, read from its scheduler: distilled models need few steps
and little or no guidance, and give burnt images with the usual ones.

| model | known by | sampler | steps | guidance |
|---|---|---|---|---|
| SD-Turbo, SDXL-Turbo (arXiv 2311.17042) | an Euler scheduler with trailing timesteps, without \
zero-terminal SNR, that predicts noise | that of the file | 4 | 0 |
| others | | ddim | 50 | 7.5 |

Steps are the most that Stability AI names for Turbo, 1 to 4; the user's own options win.
"""

from __future__ import annotations

from catversion_jax.config.sampling import USUAL, DrawingDefaults
from catversion_jax.diffusion.scheduler_config import NoiseScheduleConfig

_TURBO_SAMPLERS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}


def drawing_defaults(schedule: NoiseScheduleConfig) -> DrawingDefaults:
    """The row of the table for a model with this schedule."""
    sampler = _TURBO_SAMPLERS.get(schedule.scheduler_class)
    trained_for_few = (
        schedule.timestep_spacing == "trailing"
        and schedule.prediction_type == "epsilon"
        and not schedule.rescale_betas_zero_snr
    )
    if sampler is not None and trained_for_few:
        because = (
            f"{schedule.scheduler_class} with trailing timesteps, as SD-Turbo's and SDXL-Turbo's"
        )
        return DrawingDefaults(sampler, 4, 0.0, because)
    return USUAL
