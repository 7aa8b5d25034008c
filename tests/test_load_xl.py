"""Loading a Stable Diffusion XL folder, against StableDiffusionXLPipeline of the same folder."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_networks import QUICK
from tiny_xl import PROJECTION, WIDTHS, load_xl
from torch_reference import draw, nchw, nhwc, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import (
    Backbone,
    abstract_backbone,
    load_backbone,
    model_resolution,
)
from catversion_jax.models.text_encoders import text_states
from catversion_jax.models.unet.embeddings import AddedConditions
from catversion_jax.models.weights.model_files import open_model
from catversion_jax.models.weights.model_index import zeros_for_empty_prompt

PROMPTS = ["a teapot", "", "so, a cat! sat on a long, long wall"]


@functools.cache
def loaded(folder: Path) -> Backbone:
    return load_backbone(folder)


@functools.cache
def pipeline(folder: Path):
    return load_xl(folder)


def states_of(backbone: Backbone, prompts: list[str]):
    ids = [tokenizer(prompts) for tokenizer in backbone.tokenizers]
    return text_states(backbone.text_encoders, ids)


def test_context_and_pooled_equal_encode_prompt(tiny_xl_folder):
    ours, pipe = loaded(tiny_xl_folder), pipeline(tiny_xl_folder)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    found = states_of(ours, PROMPTS)
    assert found.context.shape == (3, 24, sum(WIDTHS))
    assert found.pooled.shape == (3, PROJECTION)
    assert relative_error(found.context, context) < 1e-4
    assert relative_error(found.pooled, pooled) < 1e-4


def test_each_tokenizer_pads_as_its_own(tiny_xl_folder):
    ours, pipe = loaded(tiny_xl_folder), pipeline(tiny_xl_folder)
    for tokenizer, reference in zip(
        ours.tokenizers, (pipe.tokenizer, pipe.tokenizer_2), strict=True
    ):
        expected = reference(PROMPTS, padding="max_length", max_length=24, truncation=True)
        np.testing.assert_array_equal(tokenizer(PROMPTS), expected.input_ids)
        for prompt, row in zip(PROMPTS, tokenizer(PROMPTS), strict=True):
            np.testing.assert_array_equal(tokenizer.place(prompt).token_ids, row)
    first, second = (tokenizer([""])[0] for tokenizer in ours.tokenizers)
    end = first[1]
    assert (first[1:] == end).all()
    assert second[1] == end
    assert (second[2:] == 0).all()


def test_the_unet_equals_the_pipelines(tiny_xl_folder):
    ours, pipe = loaded(tiny_xl_folder), pipeline(tiny_xl_folder)
    sample, context = draw(2, 16, 16, 4), draw(2, 24, sum(WIDTHS), seed=1)
    pooled = draw(2, PROJECTION, seed=2)
    ids = np.array([[1024, 768, 0, 16, 1024, 1024], [32, 32, 0, 0, 32, 32]], np.float32)
    added = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(ids)}
    with torch.no_grad():
        expected = pipe.unet(nchw(sample), 37, torch.tensor(context), added_cond_kwargs=added)

    @jax.jit(compiler_options=QUICK)
    def forward(unet):
        return unet(sample, 37, context, added=AddedConditions(pooled, ids))

    assert relative_error(forward(ours.unet), nhwc(expected.sample)) < 1e-4


def test_facts_about_the_folder(tiny_xl_folder):
    ours = loaded(tiny_xl_folder)
    first, second = ours.text_facts
    assert (first.num_layers, first.num_context_layers, first.num_heads) == (4, 3, 4)
    assert (second.num_layers, second.num_context_layers, second.head_dim) == (5, 4, 12)
    assert len({len(first.sha256), len(second.sha256), 64}) == 1
    assert first.sha256 != second.sha256
    assert ours.digests.keys() == {"text_encoder", "text_encoder_2", "unet", "vae", "scheduler"}
    assert ours.latent_scale == 0.13025
    assert ours.default_resolution == model_resolution(open_model(tiny_xl_folder)) == 32
    assert ours.zeros_for_empty_prompt


@pytest.mark.slow
def test_bfloat16_and_the_abstract_networks(tiny_xl_folder):
    half, abstract = (
        load_backbone(tiny_xl_folder, dtype="bfloat16"),
        abstract_backbone(tiny_xl_folder),
    )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((half.text_encoders, half.unet))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert states_of(half, PROMPTS).pooled.dtype == jnp.bfloat16
    assert [f.sha256 for f in half.text_facts] == [
        f.sha256 for f in loaded(tiny_xl_folder).text_facts
    ]
    for name in ("text_encoders", "unet", "vae"):
        shapes, real = (
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), getattr(backbone, name))
            for backbone in (abstract, loaded(tiny_xl_folder))
        )
        assert shapes == real


def test_what_knows_one_encoder_says_so(tiny_xl_folder):
    """Nothing that acts on half of the prompt goes on in silence."""
    ours = loaded(tiny_xl_folder)
    names = ("text_encoder", "tokenizer", "text_encoder_sha256", "num_text_layers", "num_heads")
    for name in (*names, "head_dim"):
        with pytest.raises(CatVersionError, match=r"has 2 text encoders .*half of the prompt"):
            getattr(ours, name)


# ---- folders that are not one --------------------------------------------------------------------


@pytest.fixture
def broken(tiny_xl_folder, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_xl_folder, tmp_path / "model"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("component", ["text_encoder_2", "tokenizer_2", "tokenizer"])
def test_missing_component_is_named(broken, component):
    shutil.rmtree(broken / component)
    with pytest.raises(CatVersionError, match=rf"missing component {component}; expected"):
        load_backbone(broken)


@pytest.mark.parametrize(
    ("component", "values", "message"),
    [
        ("unet", {"cross_attention_dim": 32}, r"hidden_size = 32 \+ 48 = 80; they must be equal"),
        (
            "unet",
            {"projection_class_embeddings_input_dim": 64},
            r"input_dim = 64, must be .* = 24 \+ 48 = 72",
        ),
        ("unet", {"addition_embed_type": None}, r"addition_embed_type is missing, .* 2 text"),
        ("text_encoder_2", {"projection_dim": 25}, r"must be .* = 25 \+ 48 = 73"),
        ("text_encoder_2", {"projection_dim": "24"}, r"text_encoder_2/config.json: projection_dim"),
        ("text_encoder_2", {"intermediate_size": 65}, r"misshaped:\n.*mlp.fc1"),
    ],
)
def test_configuration_that_does_not_fit(broken, component, values, message):
    change(broken / component / "config.json", **values)
    with pytest.raises(CatVersionError, match=message):
        load_backbone(broken)


def test_tokenizers_of_different_lengths(broken):
    change(broken / "tokenizer_2" / "tokenizer_config.json", model_max_length=20)
    with pytest.raises(CatVersionError, match="prompts of 24 and 20 tokens, must be equally"):
        load_backbone(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text_encoder_2 is a T5Encoder"),
        ({"unet": None, "_class_name": "FluxPipeline"}, "'FluxPipeline' is no .* it has no unet"),
        ({"text_encoder": [None, None]}, "has no text_encoder. Use .* XL model"),
        ({"force_zeros_for_empty_prompt": "yes"}, "= 'yes', must be true or false"),
    ],
)
def test_other_pipelines(broken, values, message):
    change(broken / "model_index.json", **values)
    with pytest.raises(CatVersionError, match=message):
        load_backbone(broken)


def test_zeros_for_an_empty_prompt_as_the_folder_says(broken, tiny_sd_folder):
    change(broken / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not abstract_backbone(broken).zeros_for_empty_prompt
    index = json.loads((broken / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (broken / "model_index.json").write_text(json.dumps(index))
    assert zeros_for_empty_prompt(broken)  # diffusers' default
    assert not abstract_backbone(tiny_sd_folder).zeros_for_empty_prompt


def test_a_plain_second_encoder_beside_fp16_weights(broken, caplog):
    pipe = load_xl(broken)
    for name in ("unet", "text_encoder"):
        getattr(pipe, name).half().save_pretrained(broken / name, variant="fp16")
    ours = load_backbone(broken, variant="fp16")
    assert "text_encoder_2" in caplog.text
    assert ours.text_facts[1].sha256 == load_backbone(broken).text_facts[1].sha256
