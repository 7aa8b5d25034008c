"""Maps of the class word against the same recipe in torch diffusers; errors a user can cause."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is torch: pip install '.[test]'")
pytest.importorskip("diffusers", reason="the reference is diffusers: pip install '.[test]'")

from small_networks import StoreProbabilities  # noqa: E402
from torch_reference import nchw, relative_error  # noqa: E402

from catversion_jax.config.masks import MaskSettings  # noqa: E402
from catversion_jax.errors import CatVersionError  # noqa: E402
from catversion_jax.models.stable_diffusion import load_backbone  # noqa: E402
from catversion_jax.sampling.class_word_masks import class_word_maps, class_word_masks  # noqa: E402

SETTINGS = MaskSettings(noise_levels=(0.2, 0.5), num_draws=2)
WORDS = ["cup", "red teapot", "cup", "dog", "dog"]


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


@torch.no_grad()
def torch_maps(folder, pixels, words, settings):
    """The recipe of the module's docstring, with diffusers' pipeline."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    kept = []
    pipe.unet.set_attn_processor(StoreProbabilities(kept))
    images = nchw(pixels.astype(np.float32) / 127.5 - 1)
    latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
    prompts = [f"a photo of a {word}" for word in words]
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(tokens)[0]
    # this tokenizer has a token per letter and none for spaces
    starts = [1 + len("aphotoofa")] * len(words)
    lengths = [len(word.replace(" ", "")) for word in words]
    per_look = []
    for level in settings.noise_levels:
        timestep = int(level * 1000)
        for draw in range(settings.num_draws):
            key = jax.random.fold_in(jax.random.key(timestep), draw)
            noise = nchw(np.asarray(jax.random.normal(key, (8, 8, 4)))[None])
            steps = torch.full((len(words),), timestep)
            noisy = pipe.scheduler.add_noise(latents, noise.expand_as(latents), steps)
            kept.clear()
            pipe.unet(noisy, steps, text)
            per_look.append([layer.mean(axis=1) for layer in kept])  # [B S T] each
    total = 0
    layers = [np.mean(looks, axis=0) for looks in zip(*per_look, strict=True)]
    finest = [layer for layer in layers if layer.shape[1] == 64]
    assert len(finest) < len(layers)  # the inner layers are too coarse
    for layer in finest:
        maps = torch.stack(
            [
                torch.tensor(image[:, start : start + length].mean(-1)).reshape(8, 8)
                for image, start, length in zip(layer, starts, lengths, strict=True)
            ]
        )
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        scaled = ((maps - low) / (high - low))[:, None]
        total = total + torch.nn.functional.interpolate(scaled, (16, 16), mode="bilinear")[:, 0]
    return (total / len(finest)).numpy()


def test_maps_equal_the_recipe_in_diffusers(tiny_sd_folder, backbone, pixels):
    ours = class_word_maps(backbone, pixels, WORDS, SETTINGS)
    assert relative_error(ours, torch_maps(tiny_sd_folder, pixels, WORDS, SETTINGS)) < 1e-4


def test_masks_are_repeatable_and_an_image_s_own(backbone, pixels):
    masks = class_word_masks(backbone, pixels, WORDS, SETTINGS)
    assert masks.shape == (5, 16, 16)
    assert masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 255}
    alone = class_word_masks(backbone, pixels[3:4], WORDS[3:4], SETTINGS)
    np.testing.assert_array_equal(alone[0], masks[3])


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ["cup"] * 4, "4 base classes for 5 images: give one per image"),
        ({"pixels": np.zeros((5, 16, 16, 3), np.float32)}, WORDS, "must be uint8"),
        ({"pixels": np.zeros((5, 15, 16, 3), np.uint8)}, WORDS, "16 x 15: .* multiples of 2"),
        ({}, ["a word beyond the context", *WORDS[1:]], "Use a shorter base class"),
    ],
)
def test_what_cannot_be_is_named(backbone, pixels, change, words, message):
    with pytest.raises(CatVersionError, match=message):
        class_word_masks(backbone, change.get("pixels", pixels), words, SETTINGS)


def test_a_broken_model_is_named(backbone, pixels):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, backbone.vae)
    with pytest.raises(CatVersionError, match="not finite"):
        class_word_masks(dataclasses.replace(backbone, vae=broken), pixels, WORDS, SETTINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_levels": ()}, "at least one"),
        ({"noise_levels": (0.2, 1.0)}, "from 0 to below 1"),
        ({"num_draws": 0}, "num_draws=0: must be at least 1"),
        ({"min_map_side": 0}, "min_map_side=0: must be at least 1"),
        ({"edge_window": 1.5}, "edge_window=1.5: must be within 0..1"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(CatVersionError, match=message):
        MaskSettings(**options)
