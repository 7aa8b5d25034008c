"""Drawing with Stable Diffusion XL: equal to StableDiffusionXLPipeline from the same latents."""

import dataclasses
import functools
import json

import diffusers
import numpy as np
import pytest
from tiny_pipelines import drawn_by_torch
from tiny_xl import load_xl

from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.diffusion import NoiseScheduleConfig
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.encoding import encode_prompt
from catversion_jax.sampling.generate import generate
from catversion_jax.sampling.requests import ImageRequest

PEERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
PROMPTS, NEGATIVE = ["a red cat!", "two dogs, snow"], ["blurry", "ugly, dull"]


@pytest.fixture(scope="module")
def backbone(tiny_xl_folder) -> Backbone:
    return load_backbone(tiny_xl_folder)


@functools.cache
def pipeline(folder):
    return load_xl(folder)


def compare(folder, backbone, settings, negative=NEGATIVE, shape=(16, 16), **changes):
    """Our images and the pipeline's, of the same latents and with the same scheduler.

    ``changes`` are of the scheduler's configuration.
    """
    settings = settings.over(backbone.drawing_defaults)
    pipe = pipeline(folder)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | changes
    pipe.scheduler = getattr(diffusers, PEERS[settings.sampler]).from_config(scheduler)
    latents = np.random.default_rng(3).normal(size=(2, 4, *shape)).astype(np.float32)
    expected = drawn_by_torch(pipe, PROMPTS, negative, latents, settings)
    schedule = NoiseScheduleConfig.from_scheduler_config(scheduler)
    ours = dataclasses.replace(backbone, noise_schedule=schedule)
    requests = [
        ImageRequest(prompt, negative_prompt=text)
        for prompt, text in zip(PROMPTS, negative or ["", ""], strict=True)
    ]
    drawn = draw_requests(ours, requests, settings, latents=latents)
    assert expected.std() > 0.05  # something is drawn
    assert np.abs(drawn.pixels - expected).max() < 1e-3
    return drawn


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", PEERS)
def test_images_equal_the_torch_pipelines(tiny_xl_folder, backbone, sampler, spacing):
    settings = SamplingSettings(sampler, num_inference_steps=5)
    compare(tiny_xl_folder, backbone, settings, timestep_spacing=spacing)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_velocities_and_a_schedule_that_ends_in_noise(tiny_xl_folder, backbone, sampler):
    """The keys of NoobAI-XL's v-prediction model."""
    settings = SamplingSettings(sampler, num_inference_steps=5)
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    compare(tiny_xl_folder, backbone, settings, timestep_spacing="trailing", **changes)


def test_an_empty_negative_prompt_is_zeros_as_none_is_in_diffusers(tiny_xl_folder, backbone):
    settings = SamplingSettings("euler", num_inference_steps=3)
    zeros = compare(tiny_xl_folder, backbone, settings, negative=None)
    encoded = draw_requests(
        dataclasses.replace(backbone, zeros_for_empty_prompt=False),
        [ImageRequest(prompt) for prompt in PROMPTS],
        settings,
        latents=np.random.default_rng(3).normal(size=(2, 4, 16, 16)).astype(np.float32),
    )
    assert np.abs(zeros.pixels - encoded.pixels).max() > 1e-2


def test_another_size_and_no_guidance(tiny_xl_folder, backbone):
    """The size of the picture is told to the network, height first."""
    settings = SamplingSettings(num_inference_steps=3, guidance_scale=1.0, height=24, width=40)
    compare(tiny_xl_folder, backbone, settings, shape=(12, 20))


def test_an_image_is_the_same_bits_whatever_the_batch(backbone):
    settings = SamplingSettings("euler_ancestral", num_inference_steps=2, batch_size=3)
    wanted = ImageRequest("a dog in snow", seed=7)
    others = [ImageRequest("a cat", seed=8, negative_prompt="ugly"), ImageRequest("", seed=7)]
    alone, together = (
        draw_requests(backbone, requests, settings) for requests in ([wanted], [*others, wanted])
    )
    np.testing.assert_array_equal(together.latents[2], alone.latents[0])
    np.testing.assert_array_equal(together.pixels[2], alone.pixels[0])


def test_generate_says_which_encoders_drew(tiny_xl_folder, backbone, tmp_path):
    from PIL import Image

    drawn = generate(
        "a cat", model=backbone, num_inference_steps=2, batch_size=3, output_dir=tmp_path
    )
    assert drawn.images.shape == (1, 32, 32, 3)
    with Image.open(drawn.files[0]) as image:
        said = " ".join(str(value) for value in image.info.values())
    assert all(facts.sha256 in said for facts in backbone.text_facts)


def test_the_context_alone_is_refused(backbone):
    with pytest.raises(CatVersionError, match="its UNet needs a pooled state too"):
        encode_prompt(backbone, "a cat", ())
