"""The noise schedule against diffusers' own, and the strictness of reading
scheduler_config.json.
"""

import numpy as np
import pytest

from catversion_jax.diffusion import NoiseScheduleConfig, alphas_cumprod, noise_schedule
from catversion_jax.errors import CatVersionError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SCHEDULES = {
    "sd15": SD15,
    "sd21": SD21,
    "zero_snr": {**SD21, "rescale_betas_zero_snr": True},
    "linear_sample": {
        **SD15,
        "_class_name": "DDIMScheduler",
        "beta_schedule": "linear",
        "prediction_type": "sample",
    },
    "cosine": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
    },
    "trained": {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "num_train_timesteps": 8,
        "trained_betas": [0.01, 0.02, 0.04, 0.08, 0.1, 0.2, 0.3, 0.4],
    },
}


def close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_target_and_snr_equal_diffusers(name):
    config = NoiseScheduleConfig.from_scheduler_config(SCHEDULES[name])
    peer = diffusers.DDIMScheduler.from_config(SCHEDULES[name])
    schedule = noise_schedule(config)
    generator = np.random.default_rng(0)
    x0, noise = generator.normal(size=(2, 6, 4, 4, 3)).astype(np.float32)
    last = config.num_train_timesteps - 1
    t = np.array([0, 1, last // 3, last // 2, last - 1, last])

    np.testing.assert_allclose(schedule.alphas_cumprod, peer.alphas_cumprod, rtol=1e-5, atol=1e-9)
    tx0, tnoise, tt = (torch.from_numpy(value) for value in (x0, noise, t))
    close(schedule.add_noise(x0, noise, t), peer.add_noise(tx0, tnoise, tt))
    expected = {
        "epsilon": tnoise,
        "sample": tx0,
        "v_prediction": peer.get_velocity(tx0, tnoise, tt),
    }
    close(schedule.target(x0, noise, t), expected[config.prediction_type])
    from diffusers.training_utils import compute_snr

    np.testing.assert_allclose(schedule.snr(t), compute_snr(peer, tt), rtol=2e-5, atol=1e-9)


def test_one_sample_and_a_scalar_timestep():
    schedule = noise_schedule(NoiseScheduleConfig.from_scheduler_config(SD21))
    x0, noise = np.random.default_rng(1).normal(size=(2, 5, 4, 4, 3)).astype(np.float32)
    t = np.array([3, 50, 400, 900, 999])
    for index in range(5):
        np.testing.assert_array_equal(
            schedule.add_noise(x0[index], noise[index], t[index]),
            schedule.add_noise(x0, noise, t)[index],
        )


def test_zero_terminal_snr_ends_exactly_at_zero():
    table = alphas_cumprod(NoiseScheduleConfig.from_scheduler_config(SCHEDULES["zero_snr"]))
    plain = alphas_cumprod(NoiseScheduleConfig.from_scheduler_config(SD21))
    assert table[-1] == 0
    np.testing.assert_allclose(table[0], plain[0], rtol=1e-6)


def published_classes():
    from diffusers.schedulers import KarrasDiffusionSchedulers

    extra = ["DDPMScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"]
    without_betas = {"EDMEulerScheduler"}
    return sorted({e.name for e in KarrasDiffusionSchedulers}.union(extra) - without_betas)


@pytest.mark.parametrize("class_name", published_classes())
def test_every_published_scheduler_class_gives_its_own_betas(class_name):
    """The file a folder has when it was saved with any of these classes, with and without the beta
    keys.
    """
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None:
        pytest.skip(f"this diffusers has no {class_name}")
    try:
        wanted = {key: SD15[key] for key in ("beta_start", "beta_end", "beta_schedule")}
        peers = [scheduler_class(**wanted), scheduler_class()]
    except ImportError as error:
        pytest.skip(str(error))
    for peer in peers:
        saved = dict(peer.config, _class_name=class_name)
        if "clip_sample" in saved:
            saved["clip_sample"] = False
        config = NoiseScheduleConfig.from_scheduler_config(saved)
        np.testing.assert_allclose(alphas_cumprod(config), peer.alphas_cumprod, rtol=1e-5)
        sparse = {k: v for k, v in saved.items() if not k.startswith("beta_")}
        sparse |= {k: v for k, v in wanted.items() if peer is peers[0]}
        config = NoiseScheduleConfig.from_scheduler_config(sparse)
        np.testing.assert_allclose(alphas_cumprod(config), peer.alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_sample": True}, ["clip_sample=True", "must be False", "scheduler_config.json"]),
        ({"thresholding": True}, ["thresholding=True"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule='sigmoid'", "squaredcos_cap_v2"]),
        (
            {"prediction_type": "flow_prediction"},
            ["prediction_type='flow_prediction'", "v_prediction"],
        ),
        ({"timestep_spacing": "trailling"}, ["timestep_spacing='trailling'", "trailing"]),
        ({"use_flow_sigmas": True}, ["use_flow_sigmas=True"]),
        ({"use_beta_sigmas": True}, ["use_beta_sigmas=True"]),
        ({"variance_type": "learned_range"}, ["variance_type='learned_range'"]),
        ({"beta_stat": 0.1}, ["unknown key 'beta_stat'", "Did you mean 'beta_start'"]),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            ["'shift'", "flow matching"],
        ),
        ({"sigma_data": 0.5}, ["unknown key 'sigma_data'"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas has 2 entries", "1000"]),
    ],
)
def test_a_value_that_would_change_the_result_is_an_error(change, words):
    with pytest.raises(CatVersionError) as caught:
        NoiseScheduleConfig.from_scheduler_config({**SD21, **change})
    for word in words:
        assert word in str(caught.value)


def test_a_missing_clip_sample_is_the_class_default():
    silent = {key: value for key, value in SD21.items() if key != "clip_sample"}
    with pytest.raises(CatVersionError, match="clip_sample"):
        NoiseScheduleConfig.from_scheduler_config(silent)
    NoiseScheduleConfig.from_scheduler_config({**silent, "_class_name": "PNDMScheduler"})
