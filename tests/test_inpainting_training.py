"""Learning a concept on an inpainting model, against torch autograd and diffusers' pipeline."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from running import final_files, run_here

from catversion_jax.cli import main
from catversion_jax.concepts.images import LoadedImage
from catversion_jax.concepts.latents import encode_concept
from catversion_jax.concepts.repainting import NUM_AREAS, areas_to_repaint
from catversion_jax.config import make_config
from catversion_jax.diffusion import noise_schedule
from catversion_jax.evaluation.evaluate import _masker
from catversion_jax.models.stable_diffusion import abstract_backbone, load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.runtime.sharding import make_mesh
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.start import planned_step

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from tiny_pipelines import load_inpainting_pipe, load_pipe, make_residual, write  # noqa: E402
from torch_reference import concatenated_attention, relative_error  # noqa: E402

from catversion_jax.integrations.diffusers import load_catversion  # noqa: E402

SIDE = 16
UPDATES = {"max_train_steps": 4, "learning_rate": 0.01}
no_grad = torch.no_grad()


@pytest.fixture(scope="module")
def folder(one_block_inpainting_folder):
    return one_block_inpainting_folder


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder)


def image(seed: int, mask: np.ndarray | None = None) -> LoadedImage:
    pixels = np.random.default_rng(seed).uniform(-1, 1, (SIDE, SIDE, 3)).astype(np.float32)
    return LoadedImage(pixels, mask)


def test_areas_are_the_whole_the_object_and_chance():
    mask = np.zeros((100, 100), np.float32)
    mask[30:50, 5:60] = 1
    photo = LoadedImage(np.zeros((100, 100, 3), np.float32), mask)
    areas = areas_to_repaint(photo, 7, 0)
    assert areas.shape == (NUM_AREAS, 100, 100)
    assert areas[0].all()
    expected = np.zeros((100, 100), bool)
    expected[20:60, :70] = True
    np.testing.assert_array_equal(areas[1], expected)
    np.testing.assert_array_equal(areas, areas_to_repaint(photo, 7, 0))
    # chance: of every seed and place another, none empty, of sides from a quarter on
    many = np.stack([areas_to_repaint(photo, seed, p)[2:] for seed in range(40) for p in range(2)])
    shares = many.reshape(-1, 100 * 100).mean(1)
    assert len(np.unique(shares)) > 100
    assert shares.min() > 0.25**2 * np.pi / 4 * 0.9
    assert shares.max() <= 1
    unmasked = LoadedImage(photo.pixels, None)
    assert not areas_to_repaint(unmasked, 7, 0)[1:].all((1, 2)).all()


def encoded(backbone, images, repainted):
    return encode_concept(
        images,
        backbone.vae,
        latent_scale=backbone.latent_scale,
        latent_downsampling=backbone.latent_downsampling,
        repainted=repainted,
    )


def test_what_is_kept_is_what_the_pipeline_reads(folder, backbone, monkeypatch):
    """``prepare_mask_latents``, from the mean of the posterior; mirrored images too."""
    photo = image(0)
    areas = areas_to_repaint(photo, 3, 0)
    kept = encoded(backbone, [photo], [areas]).kept[0]
    assert kept.shape == (NUM_AREAS, 2, 8, 8, 5)
    distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(distribution, "sample", lambda self, *args, **kwargs: self.mode())
    pipe = load_inpainting_pipe(folder)
    for area, both in zip(areas, kept, strict=True):
        for flip, mine in zip((1, -1), both, strict=True):
            mask = torch.tensor(area[None, None, :, ::flip].astype(np.float32))
            pixels = torch.tensor(photo.pixels.transpose(2, 0, 1)[None, :, :, ::flip].copy())
            where, latents = no_grad(pipe.prepare_mask_latents)(
                mask, pixels * (mask < 0.5), 1, SIDE, SIDE, torch.float32, "cpu", None, False
            )
            expected = torch.cat([where, latents], 1)[0].permute(1, 2, 0)
            assert relative_error(mine, expected) < 1e-4


def test_the_planned_step_is_that_of_training(folder, backbone):
    photos = [image(seed) for seed in range(2)]
    real = encoded(backbone, photos, [areas_to_repaint(photo, 3, 0) for photo in photos]).kept
    planned = planned_step(
        make_config({"concepts": "x", "resolution": SIDE}), abstract_backbone(folder)
    )
    mesh = make_mesh(1, jax.devices()[:1])
    _, data, *_ = abstract_arguments(planned, mesh, num_rows=3, max_images=5)
    assert data.kept.shape == (3, 5, *real.shape[1:])
    assert data.kept.dtype == real.dtype


def test_loss_and_gradient_equal_torch_autograd(folder, backbone):
    """One concept, two images with an area each."""
    residual = make_residual(0)
    rng = np.random.default_rng(1)
    latents, noise = rng.normal(size=(2, 2, 4, 8, 8)).astype(np.float32)
    kept = rng.normal(size=(2, 5, 8, 8)).astype(np.float32)
    timesteps = np.array([30, 800])
    prompts = ["a teapot", "the teapot on a hill"]
    pipe = load_pipe(folder)
    given = [
        torch.tensor(np.asarray(a), requires_grad=True) for a in (residual.key, residual.value)
    ]
    layers = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder.layers
    for row, layer in enumerate(residual.layers):
        module = layers[layer].self_attn
        rows = [array[row] for array in given]
        module.forward = functools.partial(concatenated_attention, module, *rows)
    context, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    steps = torch.tensor(timesteps)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    noisy = scheduler.add_noise(torch.tensor(latents), torch.tensor(noise), steps)
    read = torch.cat([noisy, torch.tensor(kept)], 1)
    loss = ((pipe.unet(read, steps, context).sample - torch.tensor(noise)) ** 2).mean()
    loss.backward()

    ids = backbone.tokenizer(prompts)
    hidden = backbone.text_encoder.call("lower", ids, residual.layers[0])
    batch = DiffusionBatch(
        latents.transpose(0, 2, 3, 1)[None],
        noise.transpose(0, 2, 3, 1)[None],
        timesteps.astype(np.int32)[None],
        (LowerStates(hidden[None], ids[None]),),
        kept=kept.transpose(0, 2, 3, 1)[None],
    )

    @jax.jit
    @jax.value_and_grad
    def ours(learned, text_encoders, unet):
        schedule = noise_schedule(backbone.noise_schedule)
        first = residual.layers[:1]
        return diffusion_losses(
            learned, text_encoders, unet, batch, schedule, first_layers=first
        ).sum()

    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], residual)
    found, grads = ours(stacked, backbone.text_encoders, backbone.unet)
    assert float(found) == pytest.approx(loss.item(), rel=1e-4)
    for mine, theirs in zip((grads.key, grads.value), given, strict=True):
        assert theirs.grad.abs().max() > 0
        assert relative_error(mine[0], theirs.grad) < 1e-3


def write_photos(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "concept.json").write_text('{"base_class": "cup"}')
        for index in range(2 + number):
            pixels = np.random.default_rng((number, index)).integers(
                0, 256, (SIDE, SIDE, 3), np.uint8
            )
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def company(folder, made_once):
    """A run of two concepts."""

    def train(place):
        both = write_photos(place / "both", ["red", "blue"])
        assert run_here(folder, both, place / "run", **UPDATES) == 0

    return made_once("inpainting-company", train)


def test_every_concept_is_learned(company):
    files = final_files(company / "run")
    assert set(files) == {"red", "blue"}
    assert files["red"] != files["blue"]


@pytest.mark.slow  # the program for one concept is another one
def test_a_concept_alone_is_the_concept_in_company(folder, company, tmp_path):
    red = company / "both" / "red"
    assert run_here(folder, red, tmp_path / "alone", **UPDATES) == 0
    assert final_files(tmp_path / "alone")["red"] == final_files(company / "run")["red"]


def test_an_exported_folder_paints_with_the_concept(folder, tmp_path):
    file = write(tmp_path, "tom", "cat", make_residual(0, bias=1.0))
    out = tmp_path / "out"
    command = ["export", str(file), "--format", "pipeline", "--model", str(folder)]
    assert main([*command, "--output", str(out), "--force"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and diffusers on their own future
        pipe = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "CatVersionInpaintPipeline"
    photo = Image.fromarray(np.full((SIDE, SIDE, 3), 200, np.uint8))
    where = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))

    def painted(pipe):
        return pipe(
            "a cat", image=photo, mask_image=where, num_inference_steps=2, output_type="np",
            height=SIDE, width=SIDE, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    stock = load_inpainting_pipe(folder)
    plain = painted(stock)
    load_catversion(stock, file, force=True)
    expected = painted(stock)
    assert np.abs(expected - plain).max() > 1e-3
    np.testing.assert_array_equal(painted(pipe), expected)
    assert "mask_image=" in (out / "README.md").read_text()


def test_other_masks_are_other_photos(folder, tmp_path, capsys):
    """Masks say which areas an inpainting model is shown, so they are part of what was taught."""
    red = write_photos(tmp_path / "photos", ["red"]) / "red"
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 2:9] = 255
    for index in range(2):
        Image.fromarray(mask).save(red / f"{index}.mask.png")
    assert run_here(folder, red, tmp_path / "run", **UPDATES) == 0
    assert run_here(folder, red, tmp_path / "run", **UPDATES) == 0
    Image.fromarray(mask.T.copy()).save(red / "1.mask.png")
    assert run_here(folder, red, tmp_path / "run", **UPDATES) != 0
    assert "the mask of 1.png has changed since it was trained" in capsys.readouterr().err


def test_an_inpainting_model_makes_no_masks_for_scores(folder, backbone, caplog):
    assert _masker(backbone) is None
    assert "whose attention makes no masks" in caplog.text
