"""Drawing: equal to the torch pipeline from the same latents, repeatable per seed, and the rules of
concepts.
"""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import Concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.models.weights.fingerprint import encoder_hashes
from catversion_jax.models.weights.safetensors_files import read_header
from catversion_jax.runtime.sharding import make_mesh, place_by_device, replicated
from catversion_jax.sampling import denoising as sampling
from catversion_jax.sampling.concept_shelf import ConceptShelf
from catversion_jax.sampling.denoising import draw_requests, latent_shape
from catversion_jax.sampling.encoding import KnownTexts, encode_prompt
from catversion_jax.sampling.prompts import Prompt
from catversion_jax.sampling.requests import ConceptUse, ImageRequest, check_concept
from catversion_jax.training.planning.compiled import count_collectives

QUICK = SamplingSettings(num_inference_steps=3)
PEERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder):
    return load_backbone(one_block_sd_folder)


def random_concept(backbone, word, seed=0, **options):
    shape = (2, 3, backbone.num_heads, backbone.head_dim)
    key, value = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return ConceptUse(f"my {word}", word, KVResidual(key, value, (1, 3), 0.5), **options)


def torch_images(folder, sampler, prompts, negative, latents, settings):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, PEERS[sampler])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    from tiny_pipelines import drawn_by_torch

    return drawn_by_torch(pipe, prompts, negative, latents, settings)


def compare_with_torch(folder, backbone, settings, shape=None):
    side = backbone.default_resolution // backbone.latent_downsampling
    settings = settings.over(backbone.drawing_defaults)
    latents = (
        np.random.default_rng(3).normal(size=(2, 4, *(shape or (side, side)))).astype(np.float32)
    )
    prompts, negative = ["a red cat", "two dogs, snow"], ["blurry", ""]
    expected = torch_images(folder, settings.sampler, prompts, negative, latents, settings)
    requests = [ImageRequest(p, negative_prompt=n) for p, n in zip(prompts, negative, strict=True)]
    result = draw_requests(backbone, requests, settings, latents=latents)
    assert expected.std() > 0.05  # something is drawn
    assert np.abs(result.pixels - expected).max() < 1e-3
    return result, expected


@pytest.mark.parametrize("sampler", PEERS)
def test_images_equal_the_torch_pipelines(one_block_sd_folder, backbone, sampler):
    compare_with_torch(
        one_block_sd_folder, backbone, SamplingSettings(sampler=sampler, num_inference_steps=6)
    )


@pytest.mark.parametrize("guidance_scale", [0.5, 1.0])
def test_no_guidance_at_or_below_one_and_another_size(
    one_block_sd_folder, backbone, guidance_scale
):
    settings = SamplingSettings(
        num_inference_steps=3, guidance_scale=guidance_scale, height=24, width=32
    )
    result, expected = compare_with_torch(one_block_sd_folder, backbone, settings, shape=(12, 16))
    assert result.images.shape == expected.shape == (2, 24, 32, 3)


@pytest.mark.slow
def test_a_model_that_really_draws(embedded_model):
    backbone = load_backbone(embedded_model)
    for sampler in ("ddim", "dpmsolver++"):
        compare_with_torch(
            embedded_model, backbone, SamplingSettings(sampler, num_inference_steps=8)
        )


def test_bytes_are_rounded_as_diffusers_does(backbone):
    pipeline_utils = pytest.importorskip("diffusers.utils.pil_utils")
    result = draw_requests(backbone, [ImageRequest("a cat")], QUICK)
    expected = np.stack([np.asarray(image) for image in pipeline_utils.numpy_to_pil(result.pixels)])
    assert result.images.dtype == np.uint8
    np.testing.assert_array_equal(result.images, expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_an_image_is_the_same_bits_whatever_the_batch(backbone, sampler):
    settings = SamplingSettings(sampler, num_inference_steps=3, batch_size=3)
    dog, cat = random_concept(backbone, "dog"), random_concept(backbone, "cat", seed=1)
    wanted = ImageRequest("a dog in snow", (dog,), seed=7)
    others = [
        ImageRequest("a cat", (cat,), seed=8),
        ImageRequest("a dog and a cat", (dog, cat), seed=7, negative_prompt="ugly"),
        ImageRequest("", seed=9),
    ]
    alone = draw_requests(backbone, [wanted], settings)
    for requests in ([wanted, *others], [*others, wanted], [others[1], wanted]):
        index = requests.index(wanted)
        together = draw_requests(backbone, requests, settings)
        np.testing.assert_array_equal(together.latents[index], alone.latents[0])
        np.testing.assert_array_equal(together.pixels[index], alone.pixels[0])
    assert np.abs(draw_requests(backbone, others, settings).pixels - alone.pixels).max() > 0.01


@pytest.mark.slow
def test_every_device_draws_images_of_its_own(one_block_sd_folder, backbone):
    mesh = make_mesh(1, jax.devices()[:3])
    spread = load_backbone(one_block_sd_folder, sharding=replicated(mesh))
    dog = random_concept(backbone, "dog")
    requests = [ImageRequest("a dog", (dog,), seed=seed) for seed in range(5)]
    settings = SamplingSettings("euler_ancestral", num_inference_steps=3)
    found, expected = (draw_requests(one, requests, settings) for one in (spread, backbone))
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.pixels, expected.pixels, rtol=0, atol=1e-5)
    x = place_by_device(np.zeros((3, *latent_shape(backbone, settings)), np.float32), mesh)
    program = sampling._decode.lower(mesh, spread.vae, x, np.float32(1)).compile().as_text()
    assert not count_collectives(program)


def test_seeds_differ_and_ancestral_noise_belongs_to_the_seed(backbone):
    settings = SamplingSettings("euler_ancestral", num_inference_steps=4)
    images = draw_requests(
        backbone, [ImageRequest("a cat", seed=s) for s in (1, 2, 1)], settings
    ).pixels
    np.testing.assert_array_equal(images[0], images[2])
    assert np.abs(images[0] - images[1]).max() > 0.01
    # the same start: only the noise along the way differs
    latents = np.zeros((2, 4, 8, 8), np.float32)
    images = draw_requests(
        backbone, [ImageRequest("a cat", seed=s) for s in (1, 2)], settings, latents=latents
    ).pixels
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_a_concept_acts_where_its_word_is(backbone):
    dog = random_concept(backbone, "dog")
    always = random_concept(backbone, "dog", when="always")
    zero = random_concept(backbone, "dog", scale=0.0)

    def drawn(prompt, *concepts, negative=""):
        return draw_requests(
            backbone, [ImageRequest(prompt, concepts, negative_prompt=negative)], QUICK
        ).pixels

    np.testing.assert_array_equal(drawn("a dog", zero), drawn("a dog"))
    np.testing.assert_array_equal(drawn("a cat", dog), drawn("a cat"))
    # the negative prompt is plain even where it names the concept or the concept always acts
    np.testing.assert_array_equal(
        drawn("a cat", dog, negative="dog"), drawn("a cat", negative="dog")
    )
    assert np.abs(drawn("a dog", dog) - drawn("a dog")).max() > 1e-3
    np.testing.assert_array_equal(drawn("a dog", dog), drawn("a dog", always))
    for empty in ("", "  "):  # as in PyTorch
        np.testing.assert_array_equal(drawn(empty, always), drawn(empty))
    assert np.abs(drawn("a cat", always) - drawn("a cat")).max() > 1e-3


def test_several_concepts_each_where_its_word_is(backbone):
    dog, cat = random_concept(backbone, "dog"), random_concept(backbone, "red cat", seed=1)
    both = encode_prompt(backbone, "a dog, a red cat", (dog, cat))
    for one in (dog, cat):
        assert np.abs(both - encode_prompt(backbone, "a dog, a red cat", (one,))).max() > 1e-3
    for prompt in ("a dog", "a dog, a cat", "a red dog cat"):
        np.testing.assert_array_equal(
            encode_prompt(backbone, prompt, (dog, cat)), encode_prompt(backbone, prompt, (dog,))
        )


def test_scale_is_the_odds_of_the_residual(backbone):
    """A scale of 2 is the logit bias plus log 2; 1 is the residual as it is, with the negative
    branch plain.
    """
    dog, strong = random_concept(backbone, "dog"), random_concept(backbone, "dog", scale=2.0)
    residual = dog.learned
    token_ids = backbone.tokenizer(["a dog"])
    for use, bias in ((dog, 0.5), (strong, 0.5 + np.log(2.0))):
        moved = KVResidual(residual.key, residual.value, residual.layers, float(bias))
        expected = backbone.text_encoder(token_ids, moved)[0]
        np.testing.assert_allclose(encode_prompt(backbone, "a dog", (use,)), expected, atol=1e-5)


def test_one_program_for_any_number_of_steps_guidance_and_sampler(backbone):
    requests = [ImageRequest("a cat", seed=1)]
    draw_requests(backbone, requests, QUICK)
    before = sampling._denoise_step._cache_size()
    for settings in (
        SamplingSettings(num_inference_steps=5, guidance_scale=3.0),
        SamplingSettings("euler_ancestral", num_inference_steps=2),
        SamplingSettings("dpmsolver++", num_inference_steps=4, karras=True),
    ):
        draw_requests(backbone, requests, settings)
    assert sampling._denoise_step._cache_size() == before


def test_nothing_moves_to_the_device_behind_our_back(backbone):
    request = ImageRequest("a dog", (random_concept(backbone, "dog"),))
    with jax.transfer_guard("disallow"):
        draw_requests(backbone, [request], QUICK)


def test_progress_counts_every_step(backbone):
    seen = []
    requests = [ImageRequest("a cat", seed=s) for s in range(4)]
    settings = SamplingSettings(num_inference_steps=3, batch_size=3)
    draw_requests(
        backbone, requests, settings, on_step=lambda done, total: seen.append((done, total))
    )
    assert seen == [(step, 6) for step in range(1, 7)]


def test_texts_that_come_again_are_not_encoded_again(backbone):
    known, dog = KnownTexts(3), random_concept(backbone, "dog")
    other = dataclasses.replace(dog, learned=random_concept(backbone, "dog", seed=1).learned)
    for uses in ((dog,), (other,), (dog,)):
        request = ImageRequest("a dog", uses)
        drawn = draw_requests(backbone, [request], QUICK, known=known)
        assert np.array_equal(drawn.pixels, draw_requests(backbone, [request], QUICK).pixels)
    states = known.encoded(backbone, "a dog", (other,))
    assert known.encoded(backbone, "a dog", (other,)) is states
    for number in range(3):  # no more than three are kept
        known.encoded(backbone, f"a cat {number}", ())
    assert known.encoded(backbone, "a dog", (other,)) is not states


def test_warnings_name_what_was_cut_and_who_was_not_called(backbone, caplog):
    long_prompt = "a small dog in a very big house"
    dog, house = random_concept(backbone, "dog"), random_concept(backbone, "house", seed=1)
    requests = [
        ImageRequest(long_prompt, (dog, house), seed=seed, negative_prompt="dog" * 12)
        for seed in (0, 1)
    ]
    with caplog.at_level(logging.WARNING):
        result = draw_requests(backbone, requests, QUICK)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("catversion_jax")]
    assert ours == list(result.warnings)
    cut, negative_cut, unnamed = result.warnings  # each once, for two images
    assert "24 tokens" in cut
    assert repr("se") in cut  # 'a small dog in a very big hou' are 22 letters, one token each
    assert negative_cut.startswith("negative prompt")
    assert "'my house'" in unnamed
    assert "when=always" in unnamed
    assert not draw_requests(backbone, [ImageRequest("a dog", (dog,))], QUICK).warnings


@pytest.mark.parametrize(
    ("settings", "latents", "words"),
    [
        ({"height": 17}, None, ["height=17", "multiple of 2", "16 is the nearest"]),
        ({"width": 0}, None, ["width=0"]),
        ({}, np.zeros((1, 8, 8, 4), np.float32), ["(1, 8, 8, 4)", "(1, 4, 8, 8)", "diffusers"]),
        ({"height": 32}, np.zeros((1, 4, 8, 8), np.float32), ["(1, 4, 16, 8)"]),
        ({}, np.full((1, 4, 8, 8), np.nan, np.float32), ["finite"]),
        ({}, np.full((1, 4, 8, 8), 1e300), ["float32 can hold"]),
        ({}, np.zeros((1, 4, 8, 8), np.int32), ["int32"]),
        ({"sampler": "eular"}, None, ["'eular'", "Did you mean 'euler'"]),
        ({"batch_size": 0}, None, ["batch_size=0"]),
        ({"guidance_scale": float("nan")}, None, ["guidance_scale=nan"]),
    ],
)
def test_impossible_settings(backbone, settings, latents, words):
    with pytest.raises(CatVersionError) as caught:
        draw_requests(
            backbone, [ImageRequest("a cat")], SamplingSettings(**settings), latents=latents
        )
    for word in words:
        assert word in str(caught.value)


def test_an_image_that_overflowed_is_named(backbone, caplog):
    """A black picture is no answer that anybody should take for one."""
    requests = [ImageRequest("a cat"), ImageRequest("a dog", seed=3)]
    latents = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    latents[1] = 3e38
    drawn = draw_requests(backbone, requests, QUICK, latents=latents)
    (warning,) = drawn.warnings
    assert "1 of 2 images, first 'a dog' with seed 3, hold numbers that are not finite" in warning
    assert warning in caplog.messages
    assert np.isfinite(drawn.pixels[0]).all()
    assert (drawn.images[1] == 0).any()


def test_impossible_requests(backbone):
    with pytest.raises(CatVersionError, match="at least one prompt"):
        draw_requests(backbone, [])
    with pytest.raises(CatVersionError, match="scale=-1"):
        random_concept(backbone, "dog", scale=-1.0)
    with pytest.raises(CatVersionError, match="when='sometimes'"):
        random_concept(backbone, "dog", when="sometimes")
    with pytest.raises(CatVersionError, match=f"seed={2**32}"):
        ImageRequest("a cat", seed=2**32)


def test_a_row_names_each_concept_once(backbone, tmp_path):
    """Twice would be twice the odds."""
    dog = Concept(random_concept(backbone, "dog").learned, "dog", "rex")
    shelf = ConceptShelf(dog)
    file = save_concept(tmp_path / "rex.safetensors", dog.learned, base_class="dog", name="rex")
    for names in (["rex", "rex"], ["rex", "rex:0.5"], ["rex", str(file)]):
        with pytest.raises(CatVersionError, match=r"'a dog': names concept 'rex' twice"):
            shelf.requests([Prompt("a dog", concepts=names)], [0])
    with pytest.raises(CatVersionError, match="concept rex: another concept of this call") as said:
        ConceptShelf([dog, dog])
    assert len(str(said.value)) < 200


def test_a_concept_of_another_model(backbone):
    dog = random_concept(backbone, "dog")
    check_concept(backbone, dog, backbone.fingerprints)
    check_concept(backbone, dog, {"text_encoder_sha256": ""})  # the file does not say
    with pytest.raises(CatVersionError, match="--force"):
        check_concept(backbone, dog, {"text_encoder_sha256": "0" * 64})
    check_concept(backbone, dog, {"text_encoder_sha256": "0" * 64}, force=True)
    sd1 = np.zeros((3, 1, 12, 64), np.float32)
    for residual in (
        KVResidual(sd1, sd1, (9, 10, 11)),
        KVResidual(dog.learned.key, dog.learned.value, (3, 4)),
    ):
        wrong = ConceptUse("wrong", "dog", residual)
        with pytest.raises(CatVersionError, match="another model"):
            check_concept(backbone, wrong, {}, force=True)


def test_a_bfloat16_copy_of_the_text_encoder(backbone, one_block_sd_folder, tmp_path, caplog):
    """``torch`` rounds; the concept was trained with one copy and is drawn with another."""
    weights = load_file(one_block_sd_folder / "text_encoder" / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, tmp_path / "bfloat16.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, tmp_path / "float16.safetensors")
    ours = backbone.text_facts[0].hashes
    half, rounded = (
        encoder_hashes(read_header(tmp_path / f"{dtype}.safetensors"))
        for dtype in ("float16", "bfloat16")
    )
    assert half.sha256 == ours.sha256
    assert rounded.sha256 == "bfloat16:" + ours.bfloat16_sha256 != ours.sha256
    dog = random_concept(backbone, "dog")
    check_concept(backbone, dog, {"text_encoder_sha256": rounded.sha256})
    facts = dataclasses.replace(backbone.text_facts[0], hashes=rounded)
    in_bfloat16 = dataclasses.replace(backbone, text_facts=(facts,))
    check_concept(in_bfloat16, dog, {"text_encoder_sha256": rounded.sha256})
    assert not caplog.records
    facts = dataclasses.replace(backbone.text_facts[0], hashes=half)
    in_float16 = dataclasses.replace(backbone, text_facts=(facts,))
    assert half.bfloat16_sha256 != ours.bfloat16_sha256  # rounded twice
    for model, trained in ((in_bfloat16, ours), (in_float16, rounded)):
        caplog.clear()
        check_concept(model, dog, {"text_encoder_sha256": trained.sha256})
        assert "cannot be checked, because one of them is stored in bfloat16" in caplog.text
