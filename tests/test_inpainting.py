"""Inpainting models against diffusers' StableDiffusionInpaintPipeline."""

import numpy as np
import pytest
from PIL import Image

from catversion_jax.cli import main
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.sampling.class_word_masks import class_word_masks
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.generate import generate
from catversion_jax.sampling.inpainting import KeptPicture
from catversion_jax.sampling.png import read_metadata
from catversion_jax.sampling.requests import ImageRequest

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from tiny_pipelines import load_inpainting_pipe  # noqa: E402

SETTINGS = SamplingSettings(num_inference_steps=3)


@pytest.fixture(scope="module")
def folder(one_block_inpainting_folder):
    return one_block_inpainting_folder


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder)


def picture(width=40, height=24):
    """Larger than what is drawn and of another shape, with a mask that has greys."""
    rng = np.random.default_rng(0)
    image = (
        rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    )
    mask = np.zeros((height, width), np.uint8)
    mask[6:20, 5:28] = 255
    mask[:3] = rng.integers(0, 256, (3, width), dtype=np.uint8)
    return KeptPicture(image, mask)


def drawn_by_diffusers(folder, latents, kept, monkeypatch):
    """From the mean of the posterior, where the pipeline draws from it."""
    pipe = load_inpainting_pipe(folder)
    distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(distribution, "sample", lambda self, *args, **kwargs: self.mode())
    return pipe(
        "a red cat",
        image=Image.fromarray(kept.image),
        mask_image=Image.fromarray(kept.mask),
        latents=torch.from_numpy(latents),
        num_inference_steps=SETTINGS.num_inference_steps,
        output_type="np",
    ).images


@pytest.mark.parametrize("whole", [False, True])
def test_pictures_equal_diffusers(folder, backbone, whole, monkeypatch):
    """``whole``: without a picture everything is painted anew."""
    kept = picture()
    if whole:
        kept = KeptPicture(kept.image, np.full_like(kept.mask, 255))
    latents = np.random.default_rng(3).normal(size=(1, 4, 8, 8)).astype(np.float32)
    expected = drawn_by_diffusers(folder, latents, kept, monkeypatch)
    found = draw_requests(
        backbone,
        [ImageRequest("a red cat")],
        SETTINGS,
        latents=latents,
        picture=None if whole else kept,
    )
    assert expected.std() > 0.05  # something is drawn
    assert np.abs(found.pixels - expected).max() < 1e-3


def test_from_files_and_the_picture_is_recorded(folder, tmp_path):
    kept = picture()
    Image.fromarray(kept.image).save(tmp_path / "photo.png")
    Image.fromarray(kept.mask).save(tmp_path / "where.png")
    command = ["generate", "--model", str(folder), "--prompt", "a red cat", "--seed", "4"]
    command += ["--num_inference_steps", "3", "--output_dir", str(tmp_path / "out")]
    files = ["--image", str(tmp_path / "photo.png"), "--mask_image", str(tmp_path / "where.png")]
    assert main([*command, *files]) == 0
    (drawn,) = (tmp_path / "out").glob("0*.png")
    given = generate(
        "a red cat", model=str(folder), seeds=4, num_inference_steps=3,
        image=kept.image, mask_image=kept.mask,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(drawn)), given.images[0])
    assert read_metadata(drawn)["kept_picture_sha256"] == kept.sha256


def test_what_cannot_be_inpainted(one_block_sd_folder, folder, backbone, tmp_path, capsys):
    plain = load_backbone(one_block_sd_folder)
    with pytest.raises(CatVersionError, match=r"reads no picture.*Give the inpainting model"):
        draw_requests(plain, [ImageRequest("a cat")], SETTINGS, picture=picture())
    with pytest.raises(CatVersionError, match=r"mask_image of type float32.*uint8"):
        KeptPicture(picture().image, np.zeros((4, 4), np.float32))
    with pytest.raises(CatVersionError, match=r"give both"):
        generate("a cat", model=backbone, image=picture().image)
    command = ["generate", "--model", str(folder), "--prompt", "a cat", "--image", "photo.png"]
    assert main([*command, "--output_dir", str(tmp_path)]) != 0
    assert "mask_image missing: give both" in capsys.readouterr().err
    with pytest.raises(CatVersionError, match=r"is an inpainting model, whose attention"):
        class_word_masks(backbone, np.zeros((1, 16, 16, 3), np.uint8), ["cat"])


def test_a_mask_is_read_as_in_training(tmp_path):
    """Of whatever form: 25 % of it are to be painted anew."""
    square = np.zeros((8, 8), np.uint8)
    square[:4, :4] = 1
    labels = Image.fromarray(square).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0])
    cut_out = np.full((8, 8, 4), 255, np.uint8)
    cut_out[..., 3] = 255 * square
    files = {
        "zero-one.png": Image.fromarray(square),
        "labels.png": labels,
        "cut-out.png": Image.fromarray(cut_out),
        "sixteen.png": Image.fromarray(np.where(square, 65535, 3000).astype(np.uint16)),
        "float.tiff": Image.fromarray(square.astype(np.float32)),
    }
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    for name, mask in files.items():
        mask.save(tmp_path / name)
        kept = KeptPicture.read(tmp_path / "photo.png", tmp_path / name)
        np.testing.assert_array_equal(kept.mask >= 128, square == 1, err_msg=name)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(CatVersionError, match=r"brightest grey is 0 of 255, so nothing would be"):
        KeptPicture.read(tmp_path / "photo.png", tmp_path / "black.png")
