"""A model folder's ``scheduler_config.json``, checked: which noise schedule the model has.

The betas come from this file whatever scheduler class it names: the noise schedule belongs to the
model, and the step rule (``samplers.py``) is chosen by name. A key that could change the result is
either used or refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from catversion_jax.diffusion.edm import SCHEDULERS as EDM_SCHEDULERS
from catversion_jax.diffusion.edm import EDMConfig
from catversion_jax.errors import CatVersionError, did_you_mean, shown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")
# Classes whose constructor defaults differ from beta_start 0.0001, beta_end 0.02, beta_schedule
# "linear".
_OWN_BETA_DEFAULTS: dict[str, dict[str, Any]] = {
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverSDEScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}
# Classes that clip the predicted x_0 to [-1, 1] unless the file says otherwise.
_CLIPS_BY_DEFAULT = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DDIMInverseScheduler",
    "DDPMParallelScheduler",
)
_MOST_TIMESTEPS = 100_000
# Keys that would change the result and have only these values here.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False, None),
    "thresholding": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "lambda_min_clipped": (-math.inf, None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Keys that choose or tune another class's own step rule, or that act only with a key refused above.
_STEP_RULE_KEYS = frozenset(
    {
        "skip_prk_steps",
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "solver_order",
        "predictor_order",
        "corrector_order",
        "tau_func",
        "solver_type",
        "solver_p",
        "algorithm_type",
        "predict_x0",
        "disable_corrector",
        "flow_shift",
        "time_shift_type",
        "noise_sampler_seed",
    }
)


@dataclasses.dataclass(frozen=True)
class NoiseScheduleConfig:
    """What ``scheduler_config.json`` says about the model and its timesteps; names and defaults are
    diffusers'.

    ``timestep_spacing=None`` means the file leaves it to the sampler, each of which has its own
    default. ``scheduler_class`` is the class that the file names; it decides no noise, only how the
    model is drawn where nobody says (``drawing_defaults.py``). With ``edm`` the model has no betas.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    scheduler_class: str = ""
    edm: EDMConfig | None = None

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseScheduleConfig:
        """Read the dictionary of a ``scheduler_config.json`` of any diffusers scheduler class.

        Raises:
          CatVersionError: a key nobody knows, or a value that would change the result and is not
            supported.
        """
        class_name = str(config.get("_class_name", ""))
        edm = None
        if class_name in EDM_SCHEDULERS:
            edm = EDMConfig.from_scheduler_config(config)
            own = {field.name for field in dataclasses.fields(edm)}
            config = {key: value for key, value in config.items() if key not in own}
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if class_name in _CLIPS_BY_DEFAULT:
            given.setdefault("clip_sample", True)
        known = {field.name for field in dataclasses.fields(cls)} - {"scheduler_class", "edm"}
        for key, value in given.items():
            if key in _REQUIRED_VALUES:
                _check_choice(key, value, _REQUIRED_VALUES[key])
            elif key not in known and key not in _STEP_RULE_KEYS:
                raise CatVersionError(_unknown_key_message(key, class_name, known))
        values = dict(_OWN_BETA_DEFAULTS.get(class_name, {}))
        # null in the file means "the default", as in diffusers' constructors
        values.update(
            {key: value for key, value in given.items() if key in known and value is not None}
        )
        if isinstance(values.get("trained_betas"), list):
            values["trained_betas"] = tuple(values["trained_betas"])
        return cls(**values, scheduler_class=class_name, edm=edm)

    def __post_init__(self) -> None:
        _check_values(self)
        _check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _check_choice("timestep_spacing", self.timestep_spacing, (*TIMESTEP_SPACINGS, None))
        _check_choice("final_sigmas_type", self.final_sigmas_type, FINAL_SIGMAS_TYPES)
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise CatVersionError(
                f"scheduler config: trained_betas has {len(self.trained_betas)} entries but "
                f"num_train_timesteps={self.num_train_timesteps}: one beta per timestep is needed; "
                "correct one of the two."
            )


def _check_values(config: NoiseScheduleConfig) -> None:
    """Types and ranges of everything that is not a choice of words."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "bool" and type(value) is not bool:
            _refuse(field.name, value, "true or false")
    for name, low in (
        ("num_train_timesteps", 1),
        ("steps_offset", 0),
        ("original_inference_steps", 1),
    ):
        value = getattr(config, name)
        if type(value) is not int or not low <= value <= _MOST_TIMESTEPS:
            _refuse(name, value, f"a whole number within {low}..{_MOST_TIMESTEPS}")
    for name in ("beta_start", "beta_end"):
        value = getattr(config, name)
        if not _is_beta(value) or value == 1:
            _refuse(name, value, "a number above 0 and below 1")
    scaling = config.timestep_scaling
    if type(scaling) not in (int, float) or not 0 < scaling <= 1e6:
        _refuse("timestep_scaling", scaling, "a number above 0")
    betas = config.trained_betas
    if betas is not None and not (isinstance(betas, tuple) and all(map(_is_beta, betas))):
        _refuse("trained_betas", betas, "a list of numbers above 0 and at most 1")


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _refuse(key: str, value: Any, rule: str) -> NoReturn:
    raise CatVersionError(
        f"scheduler config: {key}={shown(value)}: must be {rule} (Stable Diffusion has "
        "num_train_timesteps=1000, betas from 0.00085 to 0.012). Correct "
        "scheduler/scheduler_config.json, or download it again."
    )


def _check_choice(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # 0 == False in Python, but a 0 in the file is as harmless as a false
    if value not in allowed:
        choices = " or ".join("null" if choice is None else repr(choice) for choice in allowed)
        raise CatVersionError(
            f"scheduler config: {key}={shown(value)} is not supported, it must be {choices}. "
            f"Set {key} accordingly in scheduler/scheduler_config.json if the model allows it."
        )


def _unknown_key_message(key: str, class_name: str, known: set[str]) -> str:
    hint = did_you_mean(key, sorted({*known, *_REQUIRED_VALUES, *_STEP_RULE_KEYS}))
    return (
        f"scheduler config: unknown key {shown(key)} (scheduler class "
        f"{class_name[:80] or 'not named'}): it might change the result, so it is not "
        f"ignored.{hint} Models that are trained by flow matching (SD3, "
        "FLUX) cannot be used; otherwise remove the key from scheduler/scheduler_config.json."
    )
