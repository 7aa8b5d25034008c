r"""Models trained with the noise levels of EDM (arXiv 2206.00364) instead of betas: Playground 2.5.

The network ``o`` is told ``c_noise`` as its timestep and sees ``c_in x``; with ``d`` = sigma_data:

    (1)  x = x_0 + s noise,   c_noise = log(s) / 4,   c_in = 1 / sqrt(s^2 + d^2)
    (2)  x_0 = c_skip x + c_out o,   c_skip = d^2 / (s^2 + d^2),   c_out = +-s d / sqrt(s^2 + d^2)
         the sign is - with ``v_prediction``
    (3)  s_i = (s_max^{1/rho} + i / (n - 1) (s_min^{1/rho} - s_max^{1/rho}))^rho,  i < n;
         log-linear with ``sigma_schedule="exponential"``

Levels and roundings are those of diffusers' EDMEulerScheduler and EDMDPMSolverMultistepScheduler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from catversion_jax.array_types import Float
from catversion_jax.errors import CatVersionError, shown

SCHEDULERS = {"EDMEulerScheduler": "euler", "EDMDPMSolverMultistepScheduler": "dpmsolver++"}
"""Scheduler classes of such models, and the sampler that has their step rule."""

SIGMA_SCHEDULES = ("karras", "exponential")
_RANGES = {
    "sigma_min": (1e-8, 1e8),
    "sigma_max": (1e-8, 1e8),
    "sigma_data": (1e-8, 1e8),
    "rho": (0.1, 100.0),
}


@dataclasses.dataclass(frozen=True)
class EDMConfig:
    """The noise levels; names and defaults are diffusers'."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    sigma_schedule: str = "karras"

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> EDMConfig:
        """Read the keys of :class:`EDMConfig`; absent ones and null take the defaults.

        Raises:
          CatVersionError: a value that cannot be.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if config.get(name) is not None})

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise CatVersionError(
                    f"scheduler config: {name}={shown(value)}: must be a number within "
                    f"{low:g}..{high:g} (Playground 2.5 has sigma_min 0.002, sigma_max 80). "
                    "Correct scheduler/scheduler_config.json, or download it again."
                )
        if self.sigma_schedule not in SIGMA_SCHEDULES or self.sigma_min >= self.sigma_max:
            raise CatVersionError(
                f"scheduler config: sigma_schedule={shown(self.sigma_schedule)} from "
                f"{self.sigma_max:g} to {self.sigma_min:g}: must be one of "
                f"{', '.join(SIGMA_SCHEDULES)} from a larger to a smaller level. Correct "
                "scheduler/scheduler_config.json, or download it again."
            )

    def levels(self, num_steps: int) -> Float[np.ndarray, " n"]:
        """Equation (3), descending, float64."""
        if self.sigma_schedule == "exponential":
            logs = np.linspace(np.log(self.sigma_min), np.log(self.sigma_max), num_steps)
            return np.exp(logs)[::-1]
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + np.linspace(0, 1, num_steps) * (low - high)) ** self.rho

    def preconditioning(
        self, s: Float[np.ndarray, " n"], prediction_type: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``c_noise, c_in, c_skip, c_out`` of equations (1) and (2).

        Raises:
          CatVersionError: the model predicts the image itself.
        """
        if prediction_type == "sample":
            raise CatVersionError(
                "scheduler config: prediction_type='sample' is not supported with EDM's noise "
                "levels, it must be 'epsilon' or 'v_prediction'. Correct "
                "scheduler/scheduler_config.json, or use another model."
            )
        sign = -1 if prediction_type == "v_prediction" else 1
        total = np.sqrt(s**2 + self.sigma_data**2)
        c_out = sign * s * self.sigma_data / total
        return np.log(s) / 4, 1 / total, (self.sigma_data / total) ** 2, c_out
