r"""Samplers as tables: every step is linear, so a sampler is seven numbers per step.

With the network's output ``o`` at ``c_in x`` and timestep t, and the previous step's x_0 estimate
``y``:

    (1)  x_0    = E x + F o
    (2)  x_next = A x + B o + C y + D noise

The table is computed in float64 on the host; a compiled step takes one row of it as traced scalars,
so another sampler or another number of steps does not recompile. The rows, with ``a`` the
cumulative alphas (DDIM) or ``s = sqrt((1 - a) / a)`` (the others), primes for the next step, e.g.
``a'``:

    (3)  DDIM (arXiv 2010.02502, equations 12 and 16), c_in = 1, eps the implied noise:
             x_next = sqrt(a') x_0 + sqrt(1 - a' - d^2) eps + d noise
             d = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')
    (4)  Euler (arXiv 2206.00364), x scaled so that x = x_0 + s eps, c_in = 1 / sqrt(s^2 + 1):
             x_next = (s'/s) x + (1 - s'/s) x_0
    (5)  Euler ancestral: (4) towards ``down`` instead of s', then ``up`` noise:
             up = sqrt(s'^2 (s^2 - s'^2) / s^2),  down = sqrt(s'^2 - up^2)
    (6)  DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), c_in = 1, alpha = 1 / sqrt(s^2 + 1),
         sigma = s alpha, lambda = -log s, h = lambda' - lambda, r = (lambda - lambda_before) / h:
             x_next = (sigma'/sigma) x + alpha' (1 - e^-h) (x_0 + (x_0 - y) / (2 r))
         first order (without the last term) at the first step and, see ``_is_first_order``, at the
         last.

    (7)  LCM (arXiv 2310.04378, algorithm 3), c_in = 1, boundary conditions of the timestep t with
         u = 10 t (timestep_scaling) and 1/2 for sigma_data:
             y = 1/4 / (u^2 + 1/4) x + u / sqrt(u^2 + 1/4) x_0
             x_next = sqrt(a') y + sqrt(1 - a') noise, the last one y

A model with the noise levels of EDM (``edm.py``) has (4) and (6) with alpha = 1 and its own E, F
and c_in. Timesteps and roundings are those of diffusers' DDIMScheduler, EulerDiscreteScheduler,
EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler and LCMScheduler, which the tests
compare with.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from catversion_jax.array_types import Array, Float
from catversion_jax.config.sampling import KARRAS_SAMPLERS, SAMPLERS
from catversion_jax.diffusion.edm import SCHEDULERS as EDM_SCHEDULERS
from catversion_jax.diffusion.edm import EDMConfig
from catversion_jax.diffusion.schedule import alphas_cumprod
from catversion_jax.diffusion.scheduler_config import NoiseScheduleConfig
from catversion_jax.errors import CatVersionError, did_you_mean

_DEFAULT_SPACING = {
    "ddim": "leading",
    "euler": "linspace",
    "euler_ancestral": "linspace",
    "dpmsolver++": "linspace",
}
_KARRAS_RHO = 7.0


class SamplerRow(NamedTuple):
    """One step's scalars: the letters of equations (1) and (2)."""

    timestep: Float[Array, ""]
    input_scale: Float[Array, ""]  # c_in
    x0_from_x: Float[Array, ""]  # E
    x0_from_output: Float[Array, ""]  # F
    next_from_x: Float[Array, ""]  # A
    next_from_output: Float[Array, ""]  # B
    next_from_previous_x0: Float[Array, ""]  # C
    next_from_noise: Float[Array, ""]  # D

    def advance(
        self, x: Array, output: Array, previous_x0: Array, noise: Array
    ) -> tuple[Array, Array]:
        """Equations (1) and (2): ``(x_next, x_0)``."""
        x0 = self.x0_from_x * x + self.x0_from_output * output
        x_next = (
            self.next_from_x * x
            + self.next_from_output * output
            + self.next_from_previous_x0 * previous_x0
            + self.next_from_noise * noise
        )
        return x_next, x0


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler for one number of steps.

    Attributes:
      name: one of ``SAMPLERS``.
      rows: float32 ``SamplerRow`` per step, in order.
      init_noise_sigma: factor from standard normal noise to the first ``x``.
    """

    name: str
    rows: tuple[SamplerRow, ...]
    init_noise_sigma: float


def make_sampler(
    name: str,
    config: NoiseScheduleConfig,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    karras: bool | None = None,
) -> Sampler:
    """Compute the table of sampler ``name`` for a model with this noise schedule.

    Args:
      name: one of ``SAMPLERS``.
      config: the model's schedule; its timestep spacing, offsets and endings are honoured as in
        diffusers.
      num_inference_steps: number of network evaluations.
      eta: DDIM only: 0 is deterministic, 1 is DDPM.
      karras: spacing of arXiv 2206.00364, equation 5, for ``KARRAS_SAMPLERS``. None: as ``config``
        says.

    Raises:
      CatVersionError: unknown name, impossible number of steps, an option the sampler does not
        have, or a zero-terminal-SNR schedule that an epsilon model cannot start from.
    """
    _check_request(name, config, num_inference_steps, eta, karras)
    if config.edm is not None:
        return _edm(name, config, config.edm, num_inference_steps)
    use_karras = config.use_karras_sigmas if karras is None else karras
    if name == "ddim":
        return _ddim(config, num_inference_steps, eta)
    if name == "lcm":
        return _lcm(config, num_inference_steps)
    if name == "dpmsolver++":
        return _dpm_solver_pp(config, num_inference_steps, use_karras)
    return _euler(name, config, num_inference_steps, use_karras and name in KARRAS_SAMPLERS)


def _check_request(
    name: str,
    config: NoiseScheduleConfig,
    num_inference_steps: int,
    eta: float,
    karras: bool | None,
) -> None:
    if name not in SAMPLERS:
        hint = did_you_mean(name, SAMPLERS, cutoff=0.4)
        raise CatVersionError(f"sampler={name!r}: must be one of {', '.join(SAMPLERS)}.{hint}")
    if not 1 <= num_inference_steps <= config.num_train_timesteps:
        raise CatVersionError(
            f"num_inference_steps={num_inference_steps}: must be within "
            f"1..{config.num_train_timesteps}, the timesteps the model was trained with; 20 to 50 "
            "is usual."
        )
    if not 0 <= eta <= 1:
        raise CatVersionError(f"eta={eta}: must be within 0 (deterministic) .. 1 (DDPM).")
    if eta > 0 and name != "ddim":
        raise CatVersionError(
            f"eta={eta} with sampler={name!r}: only 'ddim' has eta; use --sampler ddim, or "
            "euler_ancestral for another stochastic sampler."
        )
    if config.edm is not None and (name not in EDM_SCHEDULERS.values() or karras is not None):
        raise CatVersionError(
            f"sampler={name!r} with karras={karras}: {config.scheduler_class} has its own noise "
            f"levels, which {' and '.join(EDM_SCHEDULERS.values())} draw; choose one of them and "
            "leave karras out."
        )
    if karras and name not in KARRAS_SAMPLERS:
        raise CatVersionError(
            f"karras=True with sampler={name!r}: only {' and '.join(KARRAS_SAMPLERS)} have Karras "
            "spacing; leave it out or choose one of these."
        )


def _timesteps(name: str, config: NoiseScheduleConfig, num_steps: int) -> np.ndarray:
    """Descending timesteps ``[num_steps]`` float64: Table 2 of arXiv 2305.08891, rounded as
    diffusers does.
    """
    spacing = config.timestep_spacing or _DEFAULT_SPACING[name]
    total = config.num_train_timesteps
    # DPM-Solver++ leaves out the timestep next to zero, which its last step jumps over.
    count = num_steps + 1 if name == "dpmsolver++" else num_steps
    if spacing == "linspace":
        steps = np.linspace(0, total - 1, count)[::-1]
        # the Euler schedulers keep fractional timesteps and interpolate the sigmas
        steps = steps if name.startswith("euler") else steps.round()
    elif spacing == "leading":
        steps = (np.arange(count) * (total // count))[::-1].astype(np.float64) + config.steps_offset
    else:
        steps = np.round(np.arange(total, 0, -total / num_steps)) - 1
    steps = steps[:num_steps]
    if not (steps.min() >= 0 and steps.max() < total):
        raise CatVersionError(
            f"num_inference_steps={num_steps} with timestep_spacing={spacing!r} and "
            f"steps_offset={config.steps_offset} asks for timestep {int(steps.max())}, but the "
            f"model has 0..{total - 1}: use fewer steps."
        )
    return steps


def _x0_coefficients(
    prediction_type: str, signal: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, ...]:
    """``E, F`` of equation (1) for ``x = signal x_0 + sigma eps`` with ``signal^2 + sigma^2 =
    1``.
    """
    if prediction_type == "epsilon":
        return 1 / signal, -sigma / signal
    if prediction_type == "v_prediction":
        return signal, -sigma
    return np.zeros_like(signal), np.ones_like(signal)


def _table(
    timesteps: np.ndarray,
    c_in: np.ndarray,
    e: np.ndarray,
    f: np.ndarray,
    keep: np.ndarray,
    mix: np.ndarray,
    **extra: np.ndarray,
) -> tuple[SamplerRow, ...]:
    """Rows of ``x_next = keep x + mix x_0 + C y + D noise``, rounded to float32 once, at the
    end.
    """
    zeros = np.zeros_like(timesteps)
    columns = (
        timesteps,
        c_in,
        e,
        f,
        keep + mix * e,
        mix * f,
        extra.get("previous", zeros),
        extra.get("noise", zeros),
    )
    return tuple(SamplerRow(*row) for row in np.stack(columns, axis=1).astype(np.float32))


def _ddim(config: NoiseScheduleConfig, num_steps: int, eta: float) -> Sampler:
    """Equation (3)."""
    table = alphas_cumprod(config).astype(np.float64)
    timesteps = _timesteps("ddim", config, num_steps)
    here = timesteps.astype(np.int64)
    before = here - config.num_train_timesteps // num_steps
    a = table[here]
    _check_signal(config, a)
    a_next = np.where(
        before >= 0, table[np.maximum(before, 0)], 1.0 if config.set_alpha_to_one else table[0]
    )
    added = eta * np.sqrt((1 - a_next) / (1 - a) * np.maximum(1 - a / a_next, 0))
    signal, sigma = np.sqrt(a), np.sqrt(1 - a)
    e, f = _x0_coefficients(config.prediction_type, signal, sigma)
    # eps = (x - signal x_0) / sigma whatever the network predicts
    direction = np.sqrt(np.maximum(1 - a_next - added**2, 0)) / sigma
    keep, mix = direction, np.sqrt(a_next) - direction * signal
    return Sampler("ddim", _table(timesteps, np.ones_like(a), e, f, keep, mix, noise=added), 1.0)


def _check_signal(config: NoiseScheduleConfig, a: np.ndarray) -> None:
    """Refuse a step at which noise that the network predicts does not determine the image."""
    if config.prediction_type == "epsilon" and (a == 0).any():
        raise CatVersionError(
            "rescale_betas_zero_snr with prediction_type='epsilon': at the last timestep nothing "
            "of the image is left, so predicted noise does not determine it; set timestep_spacing "
            "to 'leading' in the scheduler config or use a v_prediction model."
        )


def _lcm(config: NoiseScheduleConfig, num_steps: int) -> Sampler:
    """Equation (7). Its timesteps are a choice of those that the model was distilled on."""
    original = config.original_inference_steps
    if not num_steps <= original <= config.num_train_timesteps:
        raise CatVersionError(
            f"num_inference_steps={num_steps} with sampler='lcm': must be at most "
            f"original_inference_steps={original} of the scheduler config, which must be within "
            f"1..{config.num_train_timesteps}; 4 to 8 is usual."
        )
    taught = (np.arange(original) + 1) * (config.num_train_timesteps // original) - 1
    here = taught[::-1][np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(int)]
    a = alphas_cumprod(config).astype(np.float64)[here]
    _check_signal(config, a)
    a_next = np.append(a[1:], 1.0)
    u = config.timestep_scaling * here.astype(np.float64)
    total = u**2 + 0.25
    e, f = _x0_coefficients(config.prediction_type, np.sqrt(a), np.sqrt(1 - a))
    keep, mix = np.sqrt(a_next) * 0.25 / total, np.sqrt(a_next) * u / np.sqrt(total)
    timesteps, noise = here.astype(np.float64), np.sqrt(1 - a_next)
    return Sampler("lcm", _table(timesteps, np.ones_like(a), e, f, keep, mix, noise=noise), 1.0)


def _sigma_table(config: NoiseScheduleConfig) -> np.ndarray:
    """``s_t`` for every training timestep, ascending."""
    a = alphas_cumprod(config).astype(np.float64)
    if config.rescale_betas_zero_snr:
        a[-1] = 2.0**-24  # so that the first s is not infinite; the number is diffusers'
    return np.sqrt((1 - a) / a)


def _karras(sigma_max: float, sigma_min: float, num_steps: int) -> np.ndarray:
    ramp = np.linspace(0, 1, num_steps)
    low, high = sigma_min ** (1 / _KARRAS_RHO), sigma_max ** (1 / _KARRAS_RHO)
    return (high + ramp * (low - high)) ** _KARRAS_RHO


def _timesteps_of(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The fractional timesteps at which the model's noise level is ``sigmas``: linear in ``log
    s``.
    """
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _final_sigma(config: NoiseScheduleConfig, table: np.ndarray) -> float:
    return 0.0 if config.final_sigmas_type == "zero" else float(table[0])


def _euler(name: str, config: NoiseScheduleConfig, num_steps: int, karras: bool) -> Sampler:
    """Equations (4) and (5)."""
    table = _sigma_table(config)
    timesteps = _timesteps(name, config, num_steps)
    s = np.interp(timesteps, np.arange(len(table)), table)
    if karras:
        s = _karras(s[0], s[-1], num_steps)
        timesteps = _timesteps_of(s, table)
    s_next = np.append(s[1:], 0.0 if name == "euler_ancestral" else _final_sigma(config, table))
    scale = np.sqrt(s**2 + 1)
    e, f = _x0_coefficients(config.prediction_type, 1 / scale, s / scale)
    # here x is not divided by scale: x_0 = E (x / scale) + F o
    e = e / scale
    noise = np.zeros_like(s)
    towards = s_next
    if name == "euler_ancestral":
        noise = np.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)
        towards = np.sqrt(s_next**2 - noise**2)
    ratio = towards / s
    largest = float(s.max())
    starts_at_sigma = (config.timestep_spacing or _DEFAULT_SPACING[name]) != "leading"
    init_noise_sigma = largest if starts_at_sigma else float(np.sqrt(largest**2 + 1))
    return Sampler(
        name, _table(timesteps, 1 / scale, e, f, ratio, 1 - ratio, noise=noise), init_noise_sigma
    )


def _edm(name: str, config: NoiseScheduleConfig, edm: EDMConfig, num_steps: int) -> Sampler:
    """Equations (4) and (6) with those of ``edm.py``."""
    s = edm.levels(num_steps)
    s_next = np.append(s[1:], 0.0 if config.final_sigmas_type == "zero" else edm.sigma_min)
    timesteps, c_in, e, f = edm.preconditioning(s, config.prediction_type)
    ratio = s_next / s
    second = ~_is_first_order(config, num_steps) & (name == "dpmsolver++")
    extrapolation = _extrapolation(ratio, second)
    mix, previous = (1 - ratio) * (1 + extrapolation), -(1 - ratio) * extrapolation
    rows = _table(timesteps, c_in, e, f, ratio, mix, previous=previous)
    return Sampler(name, rows, float(np.sqrt(edm.sigma_max**2 + 1)))


def _extrapolation(ratio: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``1 / (2 r)`` of equation (6) where a step is of second order: ``1 / r = h / h_before``."""
    extrapolation = np.zeros(len(ratio))
    steps = np.flatnonzero(second)
    extrapolation[steps] = 0.5 * np.log(ratio[steps]) / np.log(ratio[steps - 1])
    return extrapolation


def _is_first_order(config: NoiseScheduleConfig, num_steps: int) -> np.ndarray:
    """The first step has no predecessor; the last is first order where diffusers makes it so."""
    first_order = np.zeros(num_steps, bool)
    first_order[0] = True
    first_order[-1] |= (
        config.euler_at_final
        or config.final_sigmas_type == "zero"
        or (config.lower_order_final and num_steps < 15)
    )
    return first_order


def _dpm_solver_pp(config: NoiseScheduleConfig, num_steps: int, karras: bool) -> Sampler:
    """Equation (6)."""
    table = _sigma_table(config)
    if karras:
        s = _karras(table[-1], table[0], num_steps)
        timesteps = _timesteps_of(s, table)
        if config.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
    else:
        timesteps = _timesteps("dpmsolver++", config, num_steps)
        s = np.interp(timesteps, np.arange(len(table)), table)
    s_next = np.append(s[1:], _final_sigma(config, table))
    timesteps = np.trunc(timesteps)  # the networks of this sampler see whole timesteps in diffusers
    signal, signal_next = 1 / np.sqrt(s**2 + 1), 1 / np.sqrt(s_next**2 + 1)
    sigma, sigma_next = s * signal, s_next * signal_next
    e, f = _x0_coefficients(config.prediction_type, signal, sigma)
    ratio = s_next / s  # e^-h
    gain = signal_next * (1 - ratio)
    extrapolation = _extrapolation(ratio, ~_is_first_order(config, num_steps))
    mix, previous = gain * (1 + extrapolation), -gain * extrapolation
    rows = _table(timesteps, np.ones_like(s), e, f, sigma_next / sigma, mix, previous=previous)
    return Sampler("dpmsolver++", rows, 1.0)
