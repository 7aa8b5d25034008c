"""How a model is drawn where nobody says, read from its scheduler: distilled models need few steps
and little or no guidance, and give burnt images with the usual ones.

| model | known by | sampler | steps | guidance |
|---|---|---|---|---|
| SD-Turbo, SDXL-Turbo (arXiv 2311.17042) | an Euler scheduler with trailing timesteps, without \
zero-terminal SNR, that predicts noise | that of the file | 4 | 0 |
| latent consistency models (arXiv 2310.04378) | a UNet that takes the guidance scale | lcm | 4 \
| 8.5 |
| models with LCM-LoRA fused | LCMScheduler | lcm | 4 | 1 |
| Playground 2.5 | a scheduler of EDM (``edm.py``) | dpmsolver++ or euler | 50 | 3 |
| others | | ddim | 50 | 7.5 |

LCM's are those of diffusers' LatentConsistencyModelPipeline, Playground's its authors', and Turbo's
the most steps that Stability AI names, 1 to 4. The user's own options win.
"""

from __future__ import annotations

from catversion_jax.config.sampling import USUAL, DrawingDefaults
from catversion_jax.diffusion.edm import SCHEDULERS as EDM_SCHEDULERS
from catversion_jax.diffusion.scheduler_config import NoiseScheduleConfig

_TURBO_SAMPLERS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}


def drawing_defaults(schedule: NoiseScheduleConfig, *, takes_guidance: bool) -> DrawingDefaults:
    """The row of the table for a model with this schedule, whose UNet may take the guidance scale
    as an input.
    """
    if takes_guidance:
        return DrawingDefaults("lcm", 4, 8.5, "a UNet that takes the guidance scale, as LCM's")
    if schedule.scheduler_class == "LCMScheduler":
        return DrawingDefaults("lcm", 4, 1.0, "LCMScheduler")
    if schedule.edm is not None:
        sampler = EDM_SCHEDULERS[schedule.scheduler_class]
        because = f"{schedule.scheduler_class}, as Playground 2.5's"
        return DrawingDefaults(sampler, 50, 3.0, because)
    turbo = _TURBO_SAMPLERS.get(schedule.scheduler_class)
    trained_for_few = (
        schedule.timestep_spacing == "trailing"
        and schedule.prediction_type == "epsilon"
        and not schedule.rescale_betas_zero_snr
    )
    if turbo is not None and trained_for_few:
        because = (
            f"{schedule.scheduler_class} with trailing timesteps, as SD-Turbo's and SDXL-Turbo's"
        )
        return DrawingDefaults(turbo, 4, 0.0, because)
    return USUAL
