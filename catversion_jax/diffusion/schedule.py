r"""The forward process a checkpoint was trained with: how much noise at timestep t, and what to
predict.

With ``a_t`` the cumulative product of ``1 - beta`` (DDPM, arXiv 2006.11239; v from arXiv
2202.00512):

    (1)  x_t    = sqrt(a_t) x_0 + sqrt(1 - a_t) noise
    (2)  target = noise                                       prediction_type ``epsilon``
                = sqrt(a_t) noise - sqrt(1 - a_t) x_0         ``v_prediction``
                = x_0                                         ``sample``
    (3)  snr_t  = a_t / (1 - a_t)
    (4)  sqrt(a'_t) = (sqrt(a_t) - sqrt(a_T)) sqrt(a_1) / (sqrt(a_1) - sqrt(a_T))
         with ``rescale_betas_zero_snr`` (arXiv 2305.08891, algorithm 1), so that a'_T = 0

The betas come from the folder's ``scheduler_config.json``, whatever scheduler class it names: the
noise schedule belongs to the model, the step rule (``samplers.py``) is chosen by name. Rounding to
float32 happens where diffusers rounds, because near ``a_T`` one float32 step of ``1 - beta`` is
visible.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.diffusion.scheduler_config import NoiseScheduleConfig
from catversion_jax.errors import CatVersionError


def _cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> np.ndarray:
    """``squaredcos_cap_v2`` (improved DDPM, arXiv 2102.09672, equation 17)."""
    time = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    alpha_bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Equation (4) on float32 betas."""
    root = np.sqrt(_cumulative_alphas(betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return np.float32(1) - alphas


def _cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    # torch accumulates a float32 cumprod in double on the CPU
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def alphas_cumprod(config: NoiseScheduleConfig) -> Float[np.ndarray, " timesteps"]:
    """The table ``a_t`` in float32, on the host.

    Raises:
      CatVersionError: the model has EDM's noise levels in place of betas.
    """
    if config.edm is not None:
        raise CatVersionError(
            f"scheduler config: {config.scheduler_class} has noise levels of EDM and no betas: "
            "such a model (Playground 2.5) can be drawn, but neither trained on nor asked for "
            "masks. Use another model for these."
        )
    if config.trained_betas is not None:
        betas = np.asarray(config.trained_betas, np.float32)
    elif config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps).astype(
            np.float32
        )
    elif config.beta_schedule == "scaled_linear":
        root = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps)
        betas = root.astype(np.float32) ** 2
    else:
        betas = _cosine_betas(config.num_train_timesteps).astype(np.float32)
    if config.rescale_betas_zero_snr:
        betas = _rescale_zero_terminal_snr(betas)
    return _cumulative_alphas(betas)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Equations (1) to (3) as a pytree. ``t`` has the samples' leading axes."""

    alphas_cumprod: Float[Array, " timesteps"]
    prediction_type: str = dataclasses.field(default="epsilon", metadata={"static": True})

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps are ``0 .. num_train_timesteps - 1``."""
        return self.alphas_cumprod.shape[0]

    def _signal_and_noise(self, t: Int[Array, "*n"], like: Array) -> tuple[Array, Array]:
        a_t = self.alphas_cumprod[t]
        a_t = a_t.reshape(a_t.shape + (1,) * (like.ndim - a_t.ndim))
        return jnp.sqrt(a_t), jnp.sqrt(1 - a_t)

    def add_noise(
        self, x0: Float[Array, "*n"], noise: Float[Array, "*n"], t: Int[Array, "*n"]
    ) -> Array:
        """Noisy samples ``x_t``, equation (1), float32."""
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def target(
        self, x0: Float[Array, "*n"], noise: Float[Array, "*n"], t: Int[Array, "*n"]
    ) -> Array:
        """What the network is asked to output, equation (2)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def snr(self, t: Int[Array, "*n"]) -> Array:
        """Signal-to-noise ratio, equation (3); 0 at the last timestep of a zero-terminal-SNR
        schedule.
        """
        a_t = self.alphas_cumprod[t]
        return a_t / (1 - a_t)


def noise_schedule(config: NoiseScheduleConfig) -> NoiseSchedule:
    """The schedule of ``config`` on the device."""
    return NoiseSchedule(jnp.asarray(alphas_cumprod(config)), config.prediction_type)
