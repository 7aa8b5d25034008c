"""The PyTorch loader in Stable Diffusion XL: a concept acts in both text encoders or in none."""

import copy
import functools
import types
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the loader is for diffusers: pip install '.[torch]'")

from diffusers import (  # noqa: E402
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from tiny_pipelines import load_pipe, make_residual, write  # noqa: E402
from tiny_xl import load_xl, residuals  # noqa: E402
from torch_reference import relative_error  # noqa: E402

from catversion_jax.integrations import diffusers as loader  # noqa: E402
from catversion_jax.models.stable_diffusion import load_backbone  # noqa: E402

UGLY = {"negative_prompt": "an ugly cat", "negative_prompt_2": "no cat!"}


@functools.cache
def loaded_once(folder):
    return load_xl(folder)


@pytest.fixture
def stock(tiny_xl_folder):
    """The plain pipeline; tests leave it as it is."""
    return loaded_once(tiny_xl_folder)


@functools.cache
def backbone_of(folder):
    return load_backbone(folder)


@pytest.fixture
def pipe(stock):
    twin = copy.copy(stock)
    for name in ("text_encoder", "text_encoder_2"):
        setattr(twin, name, copy.deepcopy(getattr(stock, name)))
    return twin


@pytest.fixture
def tom(tmp_path):
    return write(tmp_path, "tom", "cat", residuals(1, logit_bias=1.0))


@torch.no_grad()
def encoded(pipe, prompt="a cat!", guided=True, **kwargs):
    """Prompt, negative prompt, pooled, negative pooled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prompt 0")
        return pipe.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=guided, **kwargs
        )


def same(found, expected) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler])
def test_a_whole_image_equals_our_sampler(tiny_xl_folder, stock, pipe, tom, scheduler):
    from catversion_jax.config.sampling import SamplingSettings
    from catversion_jax.methods.concept_file import load_concept
    from catversion_jax.sampling.denoising import draw_requests
    from catversion_jax.sampling.requests import ConceptUse, ImageRequest

    latents = np.random.default_rng(3).normal(size=(2, 4, 16, 16)).astype(np.float32)
    prompts, negative = ["a cat!", "two cats, snow"], "an ugly cat"
    # the sizes of test_sampling_xl.py, whose compiled programs are used again
    backbone = backbone_of(tiny_xl_folder)
    settings = SamplingSettings("ddim" if scheduler else "euler", num_inference_steps=5)
    settings = settings.over(backbone.drawing_defaults)

    def draw(pipe):
        if scheduler is not None:
            pipe = copy.copy(pipe)
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config, clip_sample=False)
        return pipe(
            prompts,
            negative_prompt=[negative] * 2,
            latents=torch.from_numpy(latents),
            num_inference_steps=5,
            guidance_scale=settings.guidance_scale,
            output_type="np",
        ).images

    use = ConceptUse.of(load_concept(tom))
    ours = draw_requests(
        backbone,
        [ImageRequest(prompt, (use,), negative_prompt=negative) for prompt in prompts],
        settings,
        latents=latents,
    )
    loader.load_catversion(pipe, tom)
    theirs = draw(pipe)
    assert np.abs(theirs - draw(stock)).max(axis=(1, 2, 3)).min() > 0.01  # the concept is seen
    assert np.abs(ours.pixels - theirs).max() < 1e-3


@pytest.mark.parametrize("prompt", ["a cat!", "cat! snow", "wow!cat !cat"])
def test_each_tokenizer_finds_the_word(tiny_xl_folder, pipe, tmp_path, prompt):
    """The second one reads "!" as a token of its own. Against our own encoders."""
    from catversion_jax.sampling.encoding import encode_text
    from catversion_jax.sampling.requests import ConceptUse

    learned = residuals(2, scope="class_word", logit_bias=2.0)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", learned))
    ours = encode_text(backbone_of(tiny_xl_folder), prompt, [ConceptUse("tom", "cat", learned)])
    context, _, pooled, _ = encoded(pipe, prompt)
    assert relative_error(ours.context, context[0]) < 1e-4
    assert relative_error(ours.pooled, pooled[0]) < 1e-4


def test_negative_prompts_are_plain_in_both_encoders(stock, pipe, tom):
    loader.load_catversion(pipe, tom)
    wanted, _, pooled, _ = encoded(pipe, guided=False)
    plain = encoded(stock, **UGLY)
    for width in (slice(0, 32), slice(32, None)):
        assert not torch.allclose(wanted[..., width], plain[0][..., width])
    assert not torch.allclose(pooled, plain[2])
    for negative in (UGLY, {"negative_prompt": "an ugly cat"}, {"negative_prompt": ""}, {}):
        expected = encoded(stock, **negative)
        assert same(encoded(pipe, **negative), (wanted, expected[1], pooled, expected[3]))
    assert encoded(pipe)[1].abs().max() == 0  # force_zeros_for_empty_prompt
    several = encoded(pipe, ["a cat!", "a dog"], num_images_per_prompt=2, **ugly_twice())
    expected = encoded(stock, ["a cat!", "a dog"], num_images_per_prompt=2, **ugly_twice())
    assert same(several[1::2], expected[1::2])
    assert torch.equal(several[0][2:], expected[0][2:])  # nothing calls the concept there
    torch.testing.assert_close(several[0][:2], wanted.repeat(2, 1, 1))
    torch.testing.assert_close(several[2][:2], pooled.repeat(2, 1))
    given = encoded(
        pipe, None, prompt_embeds=wanted, pooled_prompt_embeds=pooled, clip_skip=1, **UGLY
    )
    assert same(given, (wanted, plain[1], pooled, plain[3]))


def ugly_twice():
    return {name: [text] * 2 for name, text in UGLY.items()}


def test_prompt_2_is_the_second_encoders_own(stock, pipe, tom):
    plain = encoded(stock, "a cat!", prompt_2="a dog", **UGLY)
    loader.load_catversion(pipe, tom)
    wanted = encoded(pipe)[0]
    with pytest.warns(UserWarning, match="concept and is read in text_encoder_2 by the plain"):
        found = pipe.encode_prompt("a cat!", prompt_2="a dog", device="cpu", **UGLY)
    assert torch.equal(found[0][..., :32], wanted[..., :32])
    assert torch.equal(found[0][..., 32:], plain[0][..., 32:])
    assert same(found[1:], plain[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, for both encoders
        with torch.no_grad():
            pipe.encode_prompt("a dog", device="cpu")


def test_switching_is_of_both_encoders(stock, pipe, tom, tmp_path):
    plain = encoded(stock, **UGLY)
    loader.load_catversion(pipe, tom)
    wanted = encoded(pipe, **UGLY)
    assert loader.list_catversion(pipe) == [
        {
            "name": "tom",
            "active": True,
            "scale": 1.0,
            "base_class": "cat",
            "when": "class_word",
            "layers": ((1, 2), (3, 4)),
            "base_model": "",
        }
    ]
    with loader.plain(pipe):
        assert same(encoded(pipe, **UGLY), plain)
    loader.disable_catversion(pipe)
    assert same(encoded(pipe, **UGLY), plain)
    loader.enable_catversion(pipe)
    assert same(encoded(pipe, **UGLY), wanted)
    loader.set_catversion(pipe, "tom", 0.5)
    half = encoded(pipe, **UGLY)
    for width in (slice(0, 32), slice(32, None)):
        assert not torch.equal(half[0][..., width], wanted[0][..., width])
    with loader.scaled(pipe, {"tom": 1.0}):
        assert same(encoded(pipe, **UGLY), wanted)
    with pytest.raises(loader.CatVersionLoadError, match="'rex' is not active; active: tom"):
        loader.scaled(pipe, {"rex": 1.0}).__enter__()
    loader.set_catversion(pipe, "tom", plain_prompts=["a cat!"])
    assert same(encoded(pipe, **UGLY), plain)
    loader.load_catversion(pipe, write(tmp_path, "kit", "cat", residuals(5)))
    assert [one["active"] for one in loader.list_catversion(pipe)] == [False, True]
    loader.unload_catversion(pipe, "kit")
    assert type(pipe) is not StableDiffusionXLPipeline
    loader.unload_catversion(pipe)
    assert same(encoded(pipe, **UGLY), plain)
    assert type(pipe) is StableDiffusionXLPipeline
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        assert encoder.config._attn_implementation == "sdpa"
        assert not encoder._forward_pre_hooks
    assert loader.list_catversion(pipe) == []


def test_concepts_of_another_kind_of_model_are_refused(tiny_sd_folder, pipe, tom, tmp_path):
    one = write(tmp_path, "one", "cat", make_residual(0), base_model="some/model")
    with pytest.raises(
        loader.CatVersionLoadError,
        match=r"1 text encoder\(s\) of Stable Diffusion 1.x or 2.x, and StableDiffusionXLPipeline "
        r"has 2: text_encoder, text_encoder_2\..*trained on: some/model",
    ):
        loader.load_catversion(pipe, one, force=True)
    sd = load_pipe(tiny_sd_folder)
    with pytest.raises(
        loader.CatVersionLoadError, match=r"2 text encoder\(s\) of Stable Diffusion XL.*has 1: text"
    ):
        loader.load_catversion(sd, tom, force=True)
    third = types.SimpleNamespace(**pipe.components, text_encoder_3=None)
    with pytest.raises(loader.CatVersionLoadError, match="has 3: text_encoder, text_encoder_2, te"):
        loader.load_catversion(third, tom)
    lacking = copy.copy(pipe)
    lacking.text_encoder_2 = None
    with pytest.raises(
        loader.CatVersionLoadError, match="needs text_encoder and text_encoder_2 an"
    ):
        loader.load_catversion(lacking, tom)
    for untouched in (pipe, sd):
        assert loader.list_catversion(untouched) == []
        assert untouched.text_encoder.config._attn_implementation == "sdpa"


def test_a_second_encoder_of_another_architecture_is_refused(pipe, tom):
    from transformers import T5Config, T5EncoderModel

    small = T5Config(d_model=8, d_kv=2, d_ff=8, num_layers=5, num_heads=4, vocab_size=300)
    pipe.text_encoder_2 = T5EncoderModel(small)
    with pytest.raises(loader.CatVersionLoadError, match=r"text_encoder_2 .* is a T5EncoderModel"):
        loader.load_catversion(pipe, tom)
    assert loader.list_catversion(pipe) == []
    assert not pipe.text_encoder._forward_pre_hooks


def test_the_fingerprints_of_both_encoders_are_checked(tiny_xl_folder, pipe, tmp_path):

    trained = backbone_of(tiny_xl_folder).fingerprints
    found = map(loader.text_encoder_sha256, (pipe.text_encoder, pipe.text_encoder_2))
    assert list(found) == list(trained.values())
    file = write(tmp_path, "tom", "cat", residuals(), base_model=str(tiny_xl_folder), **trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_catversion(pipe, file)
    loader.unload_catversion(pipe)
    with torch.no_grad():
        pipe.text_encoder_2.text_projection.weight[0] += 0.01
    with pytest.warns(
        UserWarning, match=r"the text_encoder_2 .* fine-tuned text encoder, 0\.\d+ %"
    ):
        loader.load_catversion(pipe, file)
    loader.unload_catversion(pipe)
    with torch.no_grad():
        for parameter in pipe.text_encoder_2.parameters():
            parameter.normal_()
    with pytest.raises(
        loader.CatVersionLoadError, match=r"the text_encoder_2 .* no fine-tune of it"
    ):
        loader.load_catversion(pipe, file)
    assert loader.list_catversion(pipe) == []
    assert not pipe.text_encoder._forward_pre_hooks
    loader.load_catversion(pipe, file, force=True)


def test_a_replaced_second_encoder_leaves_no_half_of_a_concept(stock, pipe, tom, tmp_path):
    plain = encoded(stock)
    loader.load_catversion(pipe, tom)
    loader.load_catversion(pipe, write(tmp_path, "rex", "dog", residuals(7)))
    wanted = encoded(pipe)
    pipe.text_encoder_2 = copy.deepcopy(stock.text_encoder_2)
    with pytest.warns(UserWarning, match="was replaced"):
        assert same(encoded(pipe), plain)
    assert same(encoded(pipe), plain)
    assert loader.list_catversion(pipe) == []
    loader.load_catversion(pipe, tom)
    assert [one["name"] for one in loader.list_catversion(pipe)] == ["tom"]
    assert same(encoded(pipe), wanted)
    loader.unload_catversion(pipe)
    assert not pipe.text_encoder._forward_pre_hooks
    assert same(encoded(pipe), plain)


def test_other_pipelines_of_the_same_encoders(stock, pipe, tom):
    """Image to image, inpainting and ControlNet; the refiner, which has the second encoder only."""
    control = ControlNetModel.from_unet(pipe.unet)
    plain, refined = (
        encoded(stock, **UGLY),
        dict(stock.components, text_encoder=None, tokenizer=None),
    )
    refiner = StableDiffusionXLImg2ImgPipeline(**refined, add_watermarker=False)
    expected_refined = encoded(refiner, **UGLY)
    control_pipe = StableDiffusionXLControlNetPipeline(
        **pipe.components, controlnet=control, add_watermarker=False
    )
    loader.load_catversion(control_pipe, tom)
    wanted = encoded(control_pipe, **UGLY)
    assert same(wanted[1::2], plain[1::2])
    assert not torch.allclose(wanted[0], plain[0])
    for other in (
        StableDiffusionXLPipeline(**pipe.components, add_watermarker=False),
        AutoPipelineForImage2Image.from_pipe(pipe, add_watermarker=False),
        AutoPipelineForInpainting.from_pipe(pipe, add_watermarker=False),
    ):
        loader.enable_catversion(other)
        assert same(encoded(other, **UGLY), wanted)
    refiner.text_encoder_2 = pipe.text_encoder_2
    loader.enable_catversion(refiner)
    found = encoded(refiner, **UGLY)
    assert same(found[1::2], expected_refined[1::2])
    assert torch.equal(found[0], wanted[0][..., 32:])


def test_image_to_image_with_a_negative_prompt(stock, pipe, tom):
    """Against the plain pipeline that is handed the embeddings."""

    def draw(pipe, **kwargs):
        made = AutoPipelineForImage2Image.from_pipe(pipe, add_watermarker=False)
        made.set_progress_bar_config(disable=True)
        if loader.list_catversion(pipe):
            loader.enable_catversion(made)
        return made(
            image=torch.zeros(1, 3, 32, 32),
            strength=0.9,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **kwargs,
        ).images

    loader.load_catversion(pipe, tom)
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip((*names, *pooled), encoded(pipe, **UGLY), strict=True))
    assert np.array_equal(draw(pipe, prompt="a cat!", **UGLY), draw(stock, **embeds))


def test_damaged_files_of_two_parts(tmp_path, tom):
    from safetensors.torch import load_file

    from catversion_jax.integrations.concept_source import read_concept
    from catversion_jax.methods.concept_file import load_concept

    tensors, metadata = load_file(tom), load_concept(tom).metadata

    def refused(message, tensors=tensors, **changes):
        changed = {**metadata, **{f"catversion.{k}": v for k, v in changes.items()}}
        changed = {k: v for k, v in changed.items() if v is not None}
        with pytest.raises(loader.CatVersionLoadError, match=message):
            read_concept(tensors, metadata=changed)

    lost = "text_encoder_2.layers.4.value"
    refused(lost, {name: tensor for name, tensor in tensors.items() if name != lost})
    refused(
        "text_encoder.layers.9.key belongs to no layer of",
        tensors | {"text_encoder.layers.9.key": tensors[lost]},
    )
    refused("text_encoder_2_sha256", text_encoder_2_sha256=None)
    refused(r"text_encoder_2\.scope='none'", **{"text_encoder_2.scope": "none"})
    refused("belongs to no layer", format_version="2", layers="[1]")
    (first, second), _ = read_concept(tensors, metadata=metadata)
    assert (first.component, second.component) == ("text_encoder", "text_encoder_2")
    assert torch.equal(second.key[1], tensors["text_encoder_2.layers.4.key"])
