"""What a pipeline of diffusers draws with loaded concepts: pictures of other things and negative
prompts are the plain pipeline's.
"""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the loader is for diffusers: pip install '.[torch]'")

from tiny_pipelines import encode, load_pipe, make_residual, write  # noqa: E402

from catversion_jax.integrations import diffusers as loader  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(params=["eager", "sdpa"])
def implementation(request) -> str:
    return request.param


def draw(pipe, prompt, **kwargs):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(prompt, num_inference_steps=2, latents=latents, output_type="np", **kwargs).images


def uncalled_warnings(pipe, *args, **kwargs) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(pipe, *args, **kwargs)
    return sum("calls no active concept" in str(w.message) for w in caught)


def test_a_prompt_that_never_names_the_concept_warns_once(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    tom = write(tmp_path, "tom", "cat", make_residual(19))
    loader.load_catversion(pipe, tom)
    assert uncalled_warnings(pipe, "a cat", negative_prompt="blurry") == 0
    assert uncalled_warnings(pipe, "a cat", guidance_scale=1.0) == 0
    with loader.plain(pipe):
        assert uncalled_warnings(pipe, "a dog") == 0  # plain by intention
    assert uncalled_warnings(pipe, "a dog", negative_prompt="blurry") == 1
    assert uncalled_warnings(pipe, "a dog", negative_prompt="blurry") == 0
    assert uncalled_warnings(pipe, "a house", guidance_scale=1.0) == 0
    loader.load_catversion(pipe, write(tmp_path, "rex", "dog", make_residual(19)))
    assert uncalled_warnings(pipe, "a house") == 1  # other words would call a concept now
    loader.unload_catversion(pipe)
    loader.load_catversion(pipe, tom)
    loader.disable_catversion(pipe)
    assert uncalled_warnings(pipe, "a dog") == 0


def test_pictures_of_other_things_are_the_plain_ones(tiny_sd_folder, tmp_path, implementation):
    pipe = load_pipe(tiny_sd_folder, implementation)
    plain = {prompt: draw(pipe, prompt, negative_prompt="blurry") for prompt in ("a dog", "a cat")}
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", make_residual(20, bias=2.0)))
    assert uncalled_warnings(pipe, "a dog", negative_prompt="blurry") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(draw(pipe, "a dog", negative_prompt="blurry"), plain["a dog"])
    assert not np.array_equal(draw(pipe, "a cat", negative_prompt="blurry"), plain["a cat"])


@torch.no_grad()
@pytest.mark.parametrize("when", ["class_word", "always"])
def test_negative_prompts_are_plain_in_any_order_of_calls(tiny_sd_folder, tmp_path, when):
    stock, pipe = load_pipe(tiny_sd_folder), load_pipe(tiny_sd_folder)
    loader.load_catversion(
        pipe, write(tmp_path, "tom", "cat", make_residual(25, bias=2.0), when=when)
    )
    wanted = encode(pipe, "a cat", "my cat", "a cat")
    ugly = encode(stock, "an ugly cat", "no cat", "a cat")

    def check(prompts, guided, *negative):
        one = len(negative) == 1
        got, plain = pipe.encode_prompt(
            prompts, "cpu", 1, guided, negative_prompt=negative[0] if one else list(negative)
        )
        count = 1 if isinstance(prompts, str) else len(prompts)
        assert torch.equal(got, encode(pipe, *["a cat", "my cat", "a cat"][:count]))
        if guided:
            assert torch.equal(plain, encode(stock, *negative))

    assert not torch.equal(wanted[2], ugly[2])
    check("a cat", True, "an ugly cat")
    check("a cat", False, "an ugly cat")
    check("a cat", False, "an ugly cat")
    check("a cat", True, "a cat")  # the very same text
    check(["a cat", "my cat", "a cat"], True, "an ugly cat", "no cat", "a cat")
    with pytest.raises(TypeError):
        pipe.encode_prompt(["a cat"], "cpu", 1, True, negative_prompt="an ugly cat")
    check("a cat", True, "an ugly cat")
    check("a cat", False, "an ugly cat")
    assert torch.equal(encode(pipe, "an ugly cat"), encode(pipe, "an ugly cat"))
    assert not torch.equal(encode(pipe, "an ugly cat")[0], ugly[0])  # not said to be a negative one
    got, plain = pipe.encode_prompt(
        None, "cpu", 2, True, negative_prompt="an ugly cat", prompt_embeds=wanted[:1]
    )
    assert torch.equal(got, wanted[:1].repeat(2, 1, 1))
    assert torch.equal(plain, ugly[:1].repeat(2, 1, 1))


@pytest.mark.parametrize("when", ["class_word", "always"])
def test_pictures_with_a_negative_prompt(tiny_sd_folder, tmp_path, implementation, when):
    """Against the plain pipeline that is handed the embeddings of the two encoders."""
    stock, pipe = (load_pipe(tiny_sd_folder, implementation) for _ in range(2))
    loader.load_catversion(
        pipe, write(tmp_path, "tom", "cat", make_residual(26, bias=2.0), when=when)
    )
    wanted, ugly = encode(pipe, "a cat"), encode(stock, "an ugly cat")
    guided = draw(stock, None, prompt_embeds=wanted, negative_prompt_embeds=ugly)
    unguided = draw(stock, None, prompt_embeds=wanted, guidance_scale=1.0)
    for _ in range(2):
        assert np.array_equal(draw(pipe, "a cat", negative_prompt="an ugly cat"), guided)
        assert np.array_equal(draw(pipe, "a cat", guidance_scale=1.0), unguided)
    by_embeds = draw(pipe, None, prompt_embeds=wanted, negative_prompt="an ugly cat")
    assert np.array_equal(by_embeds, guided)
    assert np.array_equal(draw(pipe, "a cat", negative_prompt="an ugly cat"), guided)
    if when == "class_word":
        with pytest.warns(UserWarning, match="calls no active concept"):
            house = draw(pipe, "a house", negative_prompt="an ugly cat")
        assert np.array_equal(house, draw(stock, "a house", negative_prompt="an ugly cat"))
