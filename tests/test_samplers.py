"""Whole trajectories of every sampler against the diffusers scheduler of that name, with a cheap
fake network.
"""

import numpy as np
import pytest

from catversion_jax.config.sampling import SAMPLERS
from catversion_jax.diffusion import NoiseScheduleConfig, SamplerRow, make_sampler, noise_schedule
from catversion_jax.errors import CatVersionError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PEERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
MODEL = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def fake_network(x, t):
    """Nonlinear in x, dependent on t; smooth, because a chaotic one would measure its own chaos."""
    return (0.9 * np.tanh(0.8 * x) + 0.1 * np.sin(x + t / 300.0)).astype(np.float32)


def fake_image_network(x, t):
    """For models that predict x_0: an image-like answer that does not explode where sigma is
    large.
    """
    return (0.8 * np.tanh(x * 0.3) + 0.1 * np.sin(t / 300.0)).astype(np.float32)


def peer_trajectory(name, model, steps, start, noises, network, monkeypatch, *, eta=0.0):
    scheduler = getattr(diffusers, PEERS[name]).from_config(model)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if name in ("euler_ancestral", "lcm"):
        queue = iter(noises)
        module = {"lcm": "lcm", "euler_ancestral": "euler_ancestral_discrete"}[name]
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor",
            lambda *args, **kwargs: torch.from_numpy(next(queue)),
        )
    x = torch.from_numpy(start) * scheduler.init_noise_sigma
    points = [x.numpy().copy()]
    for index, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        extra = {"eta": eta, "variance_noise": torch.from_numpy(noises[index])} if eta else {}
        x = scheduler.step(output, t, x, **extra).prev_sample
        points.append(x.numpy().copy())
    return points, scheduler


def our_trajectory(sampler, start, noises, network):
    x = start * np.float32(sampler.init_noise_sigma)
    points = [x]
    x0 = np.zeros_like(x)
    for index, row in enumerate(sampler.rows):
        output = network(row.input_scale * x, float(row.timestep))
        x, x0 = row.advance(x, output, x0, noises[index])
        points.append(x)
    return points


def compare(name, change, steps, monkeypatch, *, eta=0.0, karras=None):
    model = {**MODEL, **change}
    if karras is not None:
        model["use_karras_sigmas"] = karras
    config = NoiseScheduleConfig.from_scheduler_config(
        {k: v for k, v in model.items() if k != "use_karras_sigmas"}
    )
    sampler = make_sampler(name, config, steps, eta=eta, karras=karras)
    generator = np.random.default_rng(steps)
    start = generator.normal(size=(1, 4, 8, 8)).astype(np.float32)
    noises = generator.normal(size=(steps + 1, 1, 4, 8, 8)).astype(np.float32)
    network = fake_image_network if config.prediction_type == "sample" else fake_network
    expected, scheduler = peer_trajectory(
        name, model, steps, start, noises, network, monkeypatch, eta=eta
    )
    assert len(sampler.rows) == len(scheduler.timesteps)
    timesteps = np.array([row.timestep for row in sampler.rows])
    np.testing.assert_allclose(timesteps, scheduler.timesteps.numpy(), rtol=0, atol=2e-3)
    assert all(value.dtype == np.float32 for value in sampler.rows[0])
    actual = our_trajectory(sampler, start, noises, network)
    assert np.isfinite(expected[-1]).all()
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


SPACINGS = (None, "leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("steps", [1, 3, 10, 27, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectory_equals_diffusers(name, spacing, steps, monkeypatch):
    for prediction in PREDICTIONS:
        if (name, prediction) == ("euler_ancestral", "sample"):
            continue  # diffusers has no such step
        change = {"prediction_type": prediction}
        if spacing is not None:
            change["timestep_spacing"] = spacing
        compare(name, change, steps, monkeypatch)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr(name, spacing, steps, monkeypatch):
    change = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": spacing,
        "prediction_type": "v_prediction",
    }
    compare(name, change, steps, monkeypatch)


@pytest.mark.parametrize("steps", [4, 15, 30])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["euler", "dpmsolver++"])
def test_karras(name, prediction, steps, monkeypatch):
    compare(name, {"prediction_type": prediction}, steps, monkeypatch, karras=True)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_eta_with_the_same_noise(prediction, eta, monkeypatch):
    for set_alpha_to_one in (True, False):
        change = {
            "prediction_type": prediction,
            "set_alpha_to_one": set_alpha_to_one,
            "steps_offset": 0,
        }
        compare("ddim", change, 12, monkeypatch, eta=eta)


@pytest.mark.parametrize("steps", [8, 16])
@pytest.mark.parametrize(
    "change",
    [
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"lower_order_final": False},
    ],
)
def test_endings(change, steps, monkeypatch):
    compare("dpmsolver++", change, steps, monkeypatch)
    compare(
        "euler", {"final_sigmas_type": change.get("final_sigmas_type", "zero")}, steps, monkeypatch
    )


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_other_beta_schedules(name, schedule, monkeypatch):
    # not from the very last timestep: there the cosine schedule has sigma 20000, and diffusers'
    # float32 Euler step subtracts two numbers of that size
    change = {
        "beta_schedule": schedule,
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",
    }
    compare(name, change, 20, monkeypatch)


def test_karras_in_the_folder_is_honoured_unless_overruled():
    config = NoiseScheduleConfig.from_scheduler_config({**MODEL, "use_karras_sigmas": True})
    explicit = NoiseScheduleConfig.from_scheduler_config(MODEL)
    for name in ("euler", "dpmsolver++"):
        assert make_sampler(name, config, 9) == make_sampler(name, explicit, 9, karras=True)
        assert make_sampler(name, config, 9, karras=False) == make_sampler(name, explicit, 9)
    assert make_sampler("ddim", config, 9) == make_sampler("ddim", explicit, 9)


def test_exact_solution_for_a_single_image():
    """The data distribution is one point m: the ideal network leads every deterministic sampler to
    m exactly.
    """
    config = NoiseScheduleConfig.from_scheduler_config(
        {**MODEL, "set_alpha_to_one": True, "prediction_type": "sample"}
    )
    point = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    for name in SAMPLERS:
        sampler = make_sampler(name, config, 7)
        noises = np.random.default_rng(1).normal(size=(8, *point.shape)).astype(np.float32)
        last = our_trajectory(sampler, noises[-1], noises, lambda x, t: point)[-1]
        if name == "ddim":
            # its last step starts from timestep 1 and lands at a' = 1 when the offset is 0
            config_zero = NoiseScheduleConfig.from_scheduler_config(
                {**MODEL, "set_alpha_to_one": True, "prediction_type": "sample", "steps_offset": 0}
            )
            last = our_trajectory(
                make_sampler(name, config_zero, 7), noises[-1], noises, lambda x, t: point
            )[-1]
        np.testing.assert_allclose(last, point, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "dpm++"}, ["sampler='dpm++'", "Did you mean 'dpmsolver++'"]),
        ({"name": "ddimm"}, ["Did you mean 'ddim'"]),
        ({"num_inference_steps": 0}, ["num_inference_steps=0", "1..1000"]),
        ({"num_inference_steps": 1001}, ["num_inference_steps=1001", "1..1000"]),
        ({"num_inference_steps": 1000}, ["timestep 1000", "steps_offset=1", "fewer steps"]),
        ({"eta": 1.5}, ["eta=1.5"]),
        ({"name": "euler", "eta": 0.5}, ["eta=0.5", "ddim"]),
        ({"karras": True}, ["karras", "euler and dpmsolver++"]),
    ],
)
def test_impossible_requests(arguments, words):
    config = NoiseScheduleConfig.from_scheduler_config(MODEL)
    arguments = {"name": "ddim", "num_inference_steps": 20, **arguments}
    with pytest.raises(CatVersionError) as caught:
        make_sampler(arguments.pop("name"), config, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_epsilon_cannot_start_at_zero_snr():
    config = NoiseScheduleConfig.from_scheduler_config(
        {**MODEL, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    )
    with pytest.raises(CatVersionError, match="v_prediction"):
        make_sampler("ddim", config, 10)


def test_another_number_of_steps_does_not_recompile():
    import jax

    config = NoiseScheduleConfig.from_scheduler_config(MODEL)
    step = jax.jit(SamplerRow.advance)
    x = np.ones((1, 2, 2, 4), np.float32)
    for name, steps in [("ddim", 5), ("ddim", 8), ("euler", 5), ("dpmsolver++", 6)]:
        for row in make_sampler(name, config, steps).rows:
            step(row, x, x, x, x)
    assert step._cache_size() == 1


# scheduler/scheduler_config.json of playground-v2.5-1024px-aesthetic
PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}
EDM_PEERS = {"euler": "EDMEulerScheduler", "dpmsolver++": "EDMDPMSolverMultistepScheduler"}


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"sigma_schedule": "exponential", "rho": 3.0},
        {"final_sigmas_type": "sigma_min", "sigma_max": 20.0, "sigma_data": 1.0},
    ],
)
@pytest.mark.parametrize("name", EDM_PEERS)
def test_noise_levels_of_edm(name, change, steps, monkeypatch):
    if steps == 1 and change.get("final_sigmas_type") == "sigma_min":
        steps = 3  # EDMEulerScheduler's only step would lead nowhere
    monkeypatch.setitem(PEERS, name, EDM_PEERS[name])
    model = PLAYGROUND | change
    config = NoiseScheduleConfig.from_scheduler_config(model)
    sampler = make_sampler(name, config, steps)
    start, *noises = np.random.default_rng(steps).normal(size=(2, 1, 4, 8, 8)).astype(np.float32)
    expected, scheduler = peer_trajectory(
        name, model, steps, start, noises, fake_network, monkeypatch
    )
    timesteps = np.array([row.timestep for row in sampler.rows])
    np.testing.assert_allclose(timesteps, scheduler.timesteps.numpy(), rtol=0, atol=1e-5)
    actual = our_trajectory(sampler, start, noises * steps, fake_network)
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "change", "options", "named"),
    [
        ("ddim", {}, {}, "euler and dpmsolver"),
        ("euler", {}, {"karras": True}, "leave karras out"),
        ("euler", {"prediction_type": "sample"}, {}, "'epsilon' or 'v_prediction'"),
        ("euler", {"sigma_min": 0.0}, {}, "sigma_min=0.0"),
        ("euler", {"sigma_min": 90.0}, {}, "from 80 to 90"),
        ("euler", {"sigma_data": float("nan")}, {}, "sigma_data=nan"),
        ("euler", {"sigma_schedule": "linear"}, {}, "one of karras, exponential"),
        ("euler", {"thresholding": True}, {}, "thresholding"),
    ],
)
def test_what_edm_cannot_be(name, change, options, named):
    with pytest.raises(CatVersionError, match=named):
        make_sampler(
            name, NoiseScheduleConfig.from_scheduler_config(PLAYGROUND | change), 5, **options
        )


def test_edm_has_no_betas_to_train_on():
    with pytest.raises(CatVersionError, match=r"no betas: .*can be drawn, but neither trained"):
        noise_schedule(NoiseScheduleConfig.from_scheduler_config(PLAYGROUND))


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_steps_and_scaling_of_consistency_models(steps, monkeypatch):
    change = {"original_inference_steps": 20, "timestep_scaling": 3.0}
    compare("lcm", change, steps, monkeypatch)
    config = NoiseScheduleConfig.from_scheduler_config(MODEL | change)
    with pytest.raises(CatVersionError, match=r"at most original_inference_steps=20"):
        make_sampler("lcm", config, 21)


@pytest.mark.parametrize(
    "change",
    [{"original_inference_steps": 0}, {"timestep_scaling": 0.0}, {"timestep_scaling": "10"}],
)
def test_what_a_consistency_model_cannot_be(change):
    with pytest.raises(CatVersionError, match=next(iter(change))):
        NoiseScheduleConfig.from_scheduler_config(MODEL | change)
