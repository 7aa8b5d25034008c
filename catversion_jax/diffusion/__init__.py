"""The forward process that a model was trained with, and the samplers that run it backwards."""

from catversion_jax.diffusion.drawing_defaults import drawing_defaults
from catversion_jax.diffusion.samplers import Sampler, SamplerRow, make_sampler
from catversion_jax.diffusion.schedule import NoiseSchedule, alphas_cumprod, noise_schedule
from catversion_jax.diffusion.scheduler_config import NoiseScheduleConfig

__all__ = [
    "NoiseSchedule",
    "NoiseScheduleConfig",
    "Sampler",
    "SamplerRow",
    "alphas_cumprod",
    "drawing_defaults",
    "make_sampler",
    "noise_schedule",
]
