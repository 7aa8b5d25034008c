"""Cached latents against diffusers' AutoencoderKL, and their independence of everything but the
image.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from catversion_jax.concepts import ConceptSpec, ImageSource
from catversion_jax.concepts.images import LoadedImage
from catversion_jax.concepts.latents import (
    ENCODE_BATCH,
    EncodedConcept,
    encode_concept,
    load_concept_images,
)
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.models.weights.convert import load_network
from catversion_jax.models.weights.network import Network

SIZE, FACTOR, SCALE = 16, 2, 0.18215


@pytest.fixture(scope="module")
def vae(tiny_sd_folder: Path) -> Network:
    config = json.loads((tiny_sd_folder / "vae" / "config.json").read_text())
    return load_network(
        lambda rngs: AutoencoderKL(VAEConfig.from_hf(config), layers=LayerFactory(rngs)),
        tiny_sd_folder / "vae",
    )


def random_images(count: int, seed: int = 0) -> list[LoadedImage]:
    rng = np.random.default_rng(seed)
    return [
        LoadedImage(rng.uniform(-1, 1, (SIZE, SIZE, 3)).astype(np.float32), None)
        for _ in range(count)
    ]


def encode(images: list[LoadedImage], vae: Network) -> EncodedConcept:
    return encode_concept(images, vae, latent_scale=SCALE, latent_downsampling=FACTOR)


def test_equals_diffusers_on_images_and_their_mirror_images(
    vae: Network, tiny_sd_folder: Path
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.AutoencoderKL.from_pretrained(tiny_sd_folder / "vae")
    images = random_images(3)
    encoded = encode(images, vae)
    side = SIZE // FACTOR
    assert encoded.mean.shape == encoded.std.shape == (3, 2, side, side, 4)
    for flip in (0, 1):
        pixels = np.stack([image.pixels[:, ::-1] if flip else image.pixels for image in images])
        with torch.no_grad():
            posterior = reference.encode(
                torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            ).latent_dist
        for ours, theirs in ((encoded.mean, posterior.mean), (encoded.std, posterior.std)):
            expected = SCALE * theirs.numpy().transpose(0, 2, 3, 1)
            assert np.abs(ours[:, flip] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_flipped_latents_are_not_latents_of_the_flipped_image(vae: Network) -> None:
    encoded = encode(random_images(1), vae)
    assert np.abs(encoded.mean[0, 1] - encoded.mean[0, 0][:, ::-1]).max() > 1e-3


def test_latents_depend_on_nothing_but_the_image(vae: Network) -> None:
    """Alone, among others, first or last, with a full or a padded last batch: the same bytes."""
    images = random_images(ENCODE_BATCH + 1)
    together = encode(images, vae)
    backwards = encode(images[::-1], vae)
    for i, image in enumerate(images):
        alone = encode([image], vae)
        for other, row in ((together, i), (backwards, len(images) - 1 - i)):
            np.testing.assert_array_equal(alone.mean[0], other.mean[row])
            np.testing.assert_array_equal(alone.std[0], other.std[row])


def test_masks_are_averaged_per_latent_pixel_and_flipped(vae: Network) -> None:
    rng = np.random.default_rng(1)
    first, second = random_images(2)
    mask = (rng.uniform(size=(SIZE, SIZE)) > 0.5).astype(np.float32)
    encoded = encode([dataclasses.replace(first, mask=mask), second], vae)
    expected = (
        mask[0::2, 0::2] / 4 + mask[1::2, 0::2] / 4 + mask[0::2, 1::2] / 4 + mask[1::2, 1::2] / 4
    )
    np.testing.assert_allclose(encoded.mask[0, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(encoded.mask[0, 1], encoded.mask[0, 0][:, ::-1])
    np.testing.assert_array_equal(encoded.mask[1], np.ones((2, SIZE // 2, SIZE // 2), np.float32))


def test_bad_input(vae: Network) -> None:
    with pytest.raises(ConceptError, match="no image to encode"):
        encode([], vae)
    odd = [LoadedImage(np.zeros((15, 15, 3), np.float32), None)]
    with pytest.raises(CatVersionError, match="resolution=15: must be a multiple of 2"):
        encode(odd, vae)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, vae)
    with pytest.raises(ConceptError, match="not finite"):
        encode(random_images(1), broken)


def test_every_unusable_image_of_a_concept_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for name in ("bad.png", "worse.png"):
        (tmp_path / name).write_bytes(b"x")
    names = ("good.png", "bad.png", "worse.png")
    spec = ConceptSpec("cup", "cup", tuple(ImageSource(name, tmp_path / name) for name in names))
    with pytest.raises(ConceptError) as caught:
        load_concept_images(spec, resolution=8)
    assert len(str(caught.value).splitlines()) == 2
    assert "bad.png" in str(caught.value)
    assert "worse.png" in str(caught.value)
    (good,) = load_concept_images(dataclasses.replace(spec, images=spec.images[:1]), resolution=8)
    assert (good.pixels.shape, good.label) == ((8, 8, 3), "good.png")
