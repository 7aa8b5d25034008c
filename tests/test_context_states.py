"""``context_states``: states behind the text encoder's output, against diffusers and the loader.

Losses and gradients are in test_objective.py and test_training_xl.py, runs in test_preserving.py.
"""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import load_pipe, make_residual, write
from tiny_xl import WIDTHS, load_xl, residuals
from torch_reference import draw, relative_error

from catversion_jax.config import make_config
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.integrations import diffusers as loader
from catversion_jax.integrations.loaded_concept import parse_concept
from catversion_jax.integrations.pipeline_folder import export_pipeline
from catversion_jax.integrations.prompt_embeds import export_prompt_embeds
from catversion_jax.methods.concept_file import Concept, load_concept
from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.table import method_for
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.encoding import encode_prompt, encode_text
from catversion_jax.sampling.requests import ConceptUse, ImageRequest, check_concept
from catversion_jax.training.start_values import init_learned

TOKENS = 24  # of the tiny folders' contexts
QUICK = SamplingSettings("ddim", num_inference_steps=3, guidance_scale=4.0)
UGLY = "an ugly cat"

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder: Path) -> Backbone:
    return load_backbone(one_block_sd_folder)


def with_states(seed: int, number: int) -> KVResidual:
    states = draw(number, 32, seed=seed + 10)
    return dataclasses.replace(make_residual(seed), states=states)


TOM, REX = with_states(0, 3), with_states(1, 2)


def uses(scale: float = 1.0) -> tuple[ConceptUse, ...]:
    return ConceptUse("tom", "cat", TOM, scale), ConceptUse("rex", "dog", REX)


@pytest.fixture
def pipe(one_block_sd_folder: Path, tmp_path: Path):
    pipe = load_pipe(one_block_sd_folder)
    for name, word, learned in (("tom", "cat", TOM), ("rex", "dog", REX)):
        loader.load_catversion(pipe, write(tmp_path, name, word, learned))
    return pipe


@torch.no_grad()
def encoded(pipe, prompts, count=1, guided=True, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prompt 0|prompt 2")
        return pipe.encode_prompt(prompts, "cpu", count, guided, **options)


def check_row(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Ours, then copies of the prompt's own last state."""
    assert relative_error(ours, theirs[: len(ours)]) < 1e-4
    assert torch.equal(theirs[len(ours) :], theirs[TOKENS - 1].expand(len(theirs) - len(ours), -1))


def test_each_concept_adds_its_states_to_the_prompts_that_name_it(backbone, pipe) -> None:
    prompts = {"a cat": 3, "a dog, a cat": 5, "a bird": 0, "a dog": 2}
    loader.set_catversion(pipe, ["tom", "rex"], [0.4, 1.0])
    positive, negative = encoded(pipe, [*prompts], 2, negative_prompt=[UGLY] * 4)
    assert positive.shape == negative.shape == (8, TOKENS + 5, 32)
    for row, (prompt, number) in enumerate(prompts.items()):
        ours = encode_prompt(backbone, prompt, uses(0.4))
        assert len(ours) == TOKENS + number, prompt
        for copy in (2 * row, 2 * row + 1):
            check_row(ours, positive[copy])
            check_row(encode_prompt(backbone, UGLY, []), negative[copy])
    whole = encode_prompt(backbone, "a cat", uses())
    np.testing.assert_array_equal(whole[TOKENS:], TOM.states)
    faded = encode_prompt(backbone, "a cat", uses(0.4))
    last = faded[TOKENS - 1]
    np.testing.assert_allclose(faded[TOKENS:], last + 0.4 * (TOM.states - last), atol=1e-5)


def test_embeddings_that_were_made_before_have_a_negative_prompt_of_their_length(pipe) -> None:
    together = encoded(pipe, ["a cat"], negative_prompt=[UGLY])
    alone, nothing = encoded(pipe, ["a cat"], guided=False)
    assert nothing is None
    later = encoded(pipe, None, prompt_embeds=alone, negative_prompt=[UGLY])
    given = encoded(pipe, ["a cat"], negative_prompt_embeds=together[1][:, :TOKENS])
    for found in (later, given):
        for one, expected in zip(found, together, strict=True):
            torch.testing.assert_close(one, expected)
    with loader.plain(pipe):
        assert encoded(pipe, ["a cat"], negative_prompt=[UGLY])[0].shape[1] == TOKENS


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return draw(3, 4, 8, 8, seed=3)


def test_pictures_equal_the_loaders(backbone, pipe, one_block_sd_folder, latents) -> None:
    """Prompts of three lengths in one batch of torch, whose filling has no influence."""
    prompts = ["a cat", "a bird", "a dog"]
    requests = [ImageRequest(prompt, uses(), negative_prompt=UGLY) for prompt in prompts]
    ours = draw_requests(backbone, requests, QUICK, latents=latents)

    def torch_draw(pipe) -> np.ndarray:
        return pipe(
            prompts,
            negative_prompt=[UGLY] * 3,
            latents=torch.from_numpy(latents),
            num_inference_steps=3,
            guidance_scale=4.0,
            output_type="np",
        ).images

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prompt 1")
        theirs = torch_draw(pipe)
    assert np.abs(ours.pixels - theirs).max() < 1e-3
    plain = torch_draw(load_pipe(one_block_sd_folder))
    assert np.abs(theirs - plain)[[0, 2]].max(axis=(1, 2, 3)).min() > 0.01
    np.testing.assert_allclose(theirs[1], plain[1], atol=1e-4)
    loader.unload_catversion(pipe)
    np.testing.assert_array_equal(torch_draw(pipe), plain)


def test_a_stock_pipeline_draws_the_exported_embeddings(
    backbone, one_block_sd_folder, latents, tmp_path
) -> None:
    """Without guidance, for which a stock pipeline has no filling to read."""
    prompts = ["a cat", "so, a cat", "the cat"]
    use = [ConceptUse("tom", "cat", TOM)]
    path = export_prompt_embeds(tmp_path / "e.safetensors", backbone, prompts, use)
    tensors = load_file(path)
    assert tensors["prompt_embeds"].shape == (3, TOKENS + 3, 32)
    negative = tensors["negative_prompt_embeds"]
    for row in negative:
        check_row(encode_prompt(backbone, "", []), row)
    theirs = load_pipe(one_block_sd_folder)(
        prompt_embeds=tensors["prompt_embeds"],
        negative_prompt_embeds=negative,
        latents=torch.from_numpy(latents),
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="np",
    ).images
    requests = [ImageRequest(prompt, tuple(use)) for prompt in prompts]
    settings = dataclasses.replace(QUICK, guidance_scale=1.0)
    ours = draw_requests(backbone, requests, settings, latents=latents)
    assert np.abs(ours.pixels - theirs).max() < 1e-3
    assert f"copies of their state {TOKENS}" in path.with_suffix(".md").read_text()


def test_company_changes_no_bit_and_scale_0_is_the_plain_model(backbone) -> None:
    cat, bird = ImageRequest("a cat", uses(), seed=3), ImageRequest("a bird", uses(), seed=4)
    off = ImageRequest("a cat", uses(0.0)[:1], seed=3)
    settings = dataclasses.replace(QUICK, num_inference_steps=2, batch_size=2)
    together = draw_requests(backbone, [bird, cat, off], settings).pixels
    plain = dataclasses.replace(cat, concepts=())
    for row, request in ((0, bird), (1, cat), (2, plain)):
        alone = draw_requests(backbone, [request], settings).pixels[0]
        np.testing.assert_array_equal(together[row], alone)
    assert np.abs(together[2] - together[1]).max() > 0.01


def start(backbone: Backbone, prompt: str, **options: object):
    config = make_config({"concepts": "unused", "layers": "1,2", **options})
    ids = [tokenizer([prompt])[0] for tokenizer in backbone.tokenizers]
    words = [
        tokenizer.word_positions(one, "cat")
        for tokenizer, one in zip(backbone.tokenizers, ids, strict=True)
    ]
    networks = (backbone.text_encoders, backbone.text_facts)
    return init_learned(config.method_options, *networks, ids, words, seed=7), words


@pytest.mark.slow  # it compiles the encoders of both kinds of model for start values alone
def test_start_values_are_the_encoders_own(backbone, one_block_sd_folder, tiny_xl_folder) -> None:
    """Of the class word's tokens in turn, in each encoder of XL; keys and values stay the same."""
    prompt = "so, a cat"
    options = {"init": "class_word", "context_states": 4}
    learned, (word,) = start(backbone, prompt, **options)
    own = encoded(load_pipe(one_block_sd_folder), prompt)[0][0].numpy()
    copied = own[[word[i % len(word)] for i in range(4)]]
    spread = 0.1 * np.sqrt(np.mean(copied**2))
    assert 0.5 < np.std(learned.states - copied) / spread < 2
    without, _ = start(backbone, prompt, init="class_word")
    np.testing.assert_array_equal(learned.key, without.key)
    np.testing.assert_array_equal(learned.value, without.value)
    assert without.states is None
    single, _ = start(backbone, prompt, init="class_word", context_states=1)
    np.testing.assert_allclose(single.states[0], own[word[0]], atol=1e-5)
    normal, _ = start(backbone, prompt, context_states=64, init_std=0.5)
    assert abs(np.std(normal.states) - 0.5) < 0.05
    xl = load_backbone(tiny_xl_folder)
    both, (first, _) = start(xl, prompt, init="class_word", context_states=1)
    side_by_side = np.concatenate([part.states for part in both.parts], axis=-1)
    with torch.no_grad():
        own = load_xl(tiny_xl_folder).encode_prompt(prompt, do_classifier_free_guidance=False)[0]
    np.testing.assert_allclose(side_by_side[0], own[0, first[0]], atol=1e-5)


# ---- Stable Diffusion XL -------------------------------------------------------------------------


def xl_states(number: int = 2) -> PerEncoder:
    parts = zip(residuals(3).parts, WIDTHS, strict=True)
    return PerEncoder(
        tuple(
            dataclasses.replace(part, states=draw(number, width, seed=width))
            for part, width in parts
        )
    )


def test_both_encoders_of_xl_are_longer_by_as_many(tiny_xl_folder, tmp_path) -> None:
    pipe, backbone = load_xl(tiny_xl_folder), load_backbone(tiny_xl_folder)
    learned = xl_states()
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", learned))
    with torch.no_grad():
        found = pipe.encode_prompt("a cat!", negative_prompt=UGLY, device="cpu")
    ours = encode_text(backbone, "a cat!", [ConceptUse("tom", "cat", learned)])
    plain = encode_text(backbone, UGLY, [])
    for states, context, pooled in ((ours, found[0], found[2]), (plain, found[1], found[3])):
        check_row(np.asarray(states.context), context[0])
        assert relative_error(states.pooled, pooled[0]) < 1e-4
    side_by_side = np.concatenate([part.states for part in learned.parts], axis=-1)
    np.testing.assert_array_equal(ours.context[TOKENS:], side_by_side)


# ---- files, folders, what cannot be --------------------------------------------------------------


@pytest.mark.parametrize("learned", [TOM, xl_states()], ids=["one encoder", "XL"])
def test_a_file_holds_it_and_is_of_a_version_that_older_programs_refuse(learned, tmp_path) -> None:
    path = write(tmp_path, "tom", "cat", learned, text_encoder_2_sha256="cd" * 32)
    concept = load_concept(path)
    assert concept.metadata["catversion.format_version"] == "4"
    for ours, read in zip(learned.parts, concept.learned.parts, strict=True):
        for name in ("key", "value", "states"):
            np.testing.assert_array_equal(getattr(read, name), getattr(ours, name))
    assert concept.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert len(concept.fingerprints) == len(learned.parts)
    summary = concept.learned.parts[0].summary("tom")
    assert summary["context_states"] == len(learned.parts[0].states)
    if len(learned.parts) > 1:
        first, second = learned.parts
        uneven = PerEncoder((dataclasses.replace(first, states=draw(3, WIDTHS[0])), second))
        file = write(tmp_path, "uneven", "cat", uneven)
        with pytest.raises(CatVersionError, match=r"context_states of the parts are \[2, 3\]"):
            load_concept(file)
        with pytest.raises(loader.CatVersionLoadError, match="2 of 2 parts have states"):
            parse_concept(file.read_bytes(), str(file))
    faded = concept.learned.scaled(0.5)
    with pytest.raises(CatVersionError, match=r"at scale 0\.5; a file holds those of one concept"):
        write(tmp_path, "faded", "cat", faded)


def test_an_exported_folder_adds_them_too(pipe, one_block_sd_folder, tmp_path) -> None:
    concepts = [Concept(TOM, "cat", "tom"), Concept(REX, "dog", "rex")]
    folder = export_pipeline(tmp_path / "out", one_block_sd_folder, concepts)
    exported = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    prompts = ["a cat", "a cat, a dog"]
    found, expected = (
        encoded(one, prompts, negative_prompt=[UGLY] * 2) for one in (exported, pipe)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert exported.unet.catversion_tokens == TOKENS


def test_what_cannot_be_is_said(backbone) -> None:
    config = make_config({"concepts": "unused", "method": "textual_inversion"})
    options = dataclasses.replace(config.method_options, context_states=2)
    with pytest.raises(CatVersionError, match="context_states=2: must be 0 with method=textual_in"):
        method_for(options)
    wide = dataclasses.replace(TOM, states=draw(2, 40))
    with pytest.raises(CatVersionError, match=r"3 layers up to number 3 and 2 context states, but"):
        check_concept(backbone, ConceptUse("tom", "cat", wide), {})
