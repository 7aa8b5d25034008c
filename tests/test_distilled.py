"""Models that were distilled to few steps: how they are drawn by default, and the same pictures as
diffusers' pipelines.
"""

import dataclasses

import numpy as np
import pytest

from catversion_jax.config import RecordingOptions
from catversion_jax.config.sampling import USUAL, SamplingSettings, grid_settings
from catversion_jax.diffusion import NoiseScheduleConfig, drawing_defaults
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.sampling import denoising
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.pages import ImageMetadata
from catversion_jax.sampling.requests import ImageRequest
from catversion_jax.training.trainable import check_trainable

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
import jax  # noqa: E402
from tiny_pipelines import load_pipe, save_tiny_sd  # noqa: E402

# scheduler_config.json of stabilityai/sd-turbo and sdxl-turbo, as far as it decides the noise
SD_TURBO = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SDXL_TURBO = SD_TURBO | {"_class_name": "EulerAncestralDiscreteScheduler"}


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder):
    return load_backbone(one_block_sd_folder)


def defaults_of(config, takes_guidance=False):
    schedule = NoiseScheduleConfig.from_scheduler_config(config)
    return drawing_defaults(schedule, takes_guidance=takes_guidance)


@pytest.mark.parametrize(
    ("config", "sampler"), [(SD_TURBO, "euler"), (SDXL_TURBO, "euler_ancestral")]
)
def test_turbo_needs_few_steps_and_no_guidance(config, sampler):
    found = defaults_of(config)
    assert (found.sampler, found.num_inference_steps, found.guidance_scale) == (sampler, 4, 0.0)
    assert config["_class_name"] in found.because


def test_playground_is_drawn_as_its_authors_do():
    found = defaults_of({"_class_name": "EDMDPMSolverMultistepScheduler"})
    assert (found.sampler, found.num_inference_steps, found.guidance_scale) == (
        "dpmsolver++",
        50,
        3,
    )
    assert defaults_of({"_class_name": "EDMEulerScheduler"}).sampler == "euler"


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_spacing": "leading"},  # SDXL base
        {"timestep_spacing": None},
        {"_class_name": "DDIMScheduler"},  # fine-tunes with trailing timesteps
        {"_class_name": "PNDMScheduler"},
        # zero-terminal SNR needs trailing timesteps too, and many steps (arXiv 2305.08891)
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_other_models_are_drawn_as_usual(change):
    assert defaults_of(SD_TURBO | change) == USUAL


def test_the_users_own_options_win():
    found = SamplingSettings(num_inference_steps=1, guidance_scale=2.0).over(defaults_of(SD_TURBO))
    assert (found.sampler, found.num_inference_steps, found.guidance_scale) == ("euler", 1, 2.0)
    assert SamplingSettings("ddim").over(defaults_of(SD_TURBO)).sampler == "ddim"
    usual = SamplingSettings().over(USUAL)
    assert (usual.sampler, usual.num_inference_steps, usual.guidance_scale) == ("ddim", 50, 7.5)


def test_sample_grids_follow_the_model():
    options = RecordingOptions()
    given = options.validation_inference_steps, options.validation_guidance_scale
    usual, turbo = (grid_settings(*given, model) for model in (USUAL, defaults_of(SD_TURBO)))
    assert (usual.sampler, usual.num_inference_steps, usual.guidance_scale) == (
        "dpmsolver++",
        25,
        7.5,
    )
    assert (turbo.sampler, turbo.num_inference_steps, turbo.guidance_scale) == ("euler", 4, 0.0)
    assert grid_settings(7, None, USUAL).num_inference_steps == 7


@pytest.mark.parametrize(("config", "steps"), [(SD_TURBO, None), (SDXL_TURBO, 1)])
def test_turbo_draws_what_diffusers_draws(one_block_sd_folder, backbone, config, steps):
    """SDXL-Turbo's sampler adds noise after all steps but the last, so one step is compared."""
    turbo = dataclasses.replace(
        backbone, noise_schedule=NoiseScheduleConfig.from_scheduler_config(config)
    )
    pipe = load_pipe(one_block_sd_folder)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    latents = np.random.default_rng(3).normal(size=(1, 4, 8, 8)).astype(np.float32)
    expected = pipe(
        "a red cat",
        latents=torch.from_numpy(latents),
        num_inference_steps=steps or 4,
        guidance_scale=0.0,
        output_type="np",
    ).images
    settings = SamplingSettings(num_inference_steps=steps)
    request = ImageRequest("a red cat")
    found = draw_requests(turbo, [request], settings, latents=latents)
    assert expected.std() > 0.05  # something is drawn
    assert np.abs(found.pixels - expected).max() < 1e-3
    recorded = ImageMetadata(turbo, settings)(request)
    assert (recorded["num_inference_steps"], recorded["guidance_scale"]) == (steps or 4, 0.0)


# ---- latent consistency models -------------------------------------------------------------------


@pytest.fixture(scope="module")
def lcm_folder(made_once):
    """As SimianLuo/LCM_Dreamshaper_v7: the UNet takes the guidance scale, here as a wave of 16."""
    return made_once("one-block-lcm", lambda f: save_tiny_sd(f, blocks=1, time_cond_proj_dim=16))


def test_consistency_models_need_four_steps():
    lcm = {"_class_name": "LCMScheduler"}
    for scheduler, takes_guidance, scale in (
        (SD_TURBO, True, 8.5),
        (lcm, True, 8.5),
        (lcm, False, 1),
    ):
        found = defaults_of(scheduler, takes_guidance)
        assert found.sampler == "lcm"
        assert (found.num_inference_steps, found.guidance_scale) == (4, scale)


@pytest.mark.parametrize("guidance_scale", [None, 1.0, 3.0])
def test_a_consistency_model_draws_what_diffusers_draws(lcm_folder, guidance_scale, monkeypatch):
    """With the same noise between the steps. Guidance is an input of the UNet at any scale."""
    backbone = load_backbone(lcm_folder)
    plain = load_pipe(lcm_folder)
    scheduler = diffusers.LCMScheduler.from_config(plain.scheduler.config)
    pipe = diffusers.LatentConsistencyModelPipeline(
        plain.vae, plain.text_encoder, plain.tokenizer, plain.unet, scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    seed = 5
    keys = jax.vmap(jax.random.key)(np.array([seed], np.uint32))
    noises = (denoising._noise(keys, fold, (8, 8, 4)) for fold in range(5))
    latents, *between = (np.asarray(noise).transpose(0, 3, 1, 2) for noise in noises)
    queue = iter(between)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *args, **kwargs: torch.from_numpy(np.array(next(queue))),
    )
    expected = pipe(
        "a red cat",
        latents=torch.from_numpy(np.array(latents)),
        num_inference_steps=4,
        guidance_scale=guidance_scale or 8.5,
        output_type="np",
    ).images
    settings = SamplingSettings(guidance_scale=guidance_scale)
    found = draw_requests(backbone, [ImageRequest("a red cat", seed=seed)], settings)
    assert expected.std() > 0.05  # something is drawn
    assert np.abs(found.pixels - expected).max() < 1e-3


def test_a_consistency_model_is_not_trained_on(lcm_folder, backbone):
    check_trainable(backbone)
    with pytest.raises(CatVersionError, match=r"latent consistency model.*it was distilled from"):
        check_trainable(load_backbone(lcm_folder))
