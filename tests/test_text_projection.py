"""The text encoder with a projection against transformers' CLIPTextModelWithProjection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from small_networks import SIZES, make_residual, token_ids
from torch_reference import (
    SDXL_TEXT_ENCODER_2,
    as_network,
    concatenated_attention,
    draw,
    randomise,
    relative_error,
)

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.models.clip.text_projection import (
    CLIPTextModelWithProjection,
    CLIPTextWithProjectionConfig,
)
from catversion_jax.models.weights.network import Network, abstract_network

START, END = 97, 98


@functools.cache
def encoders(eos_token_id: int = END) -> tuple[torch.nn.Module, Network]:
    """A random encoder of torch and ours, both with gelu as in Stable Diffusion XL."""
    own = {"hidden_act": "gelu", "projection_dim": 40, "eos_token_id": eos_token_id}
    config = transformers.CLIPTextConfig(**(SIZES | own), attn_implementation="eager")
    reference = randomise(transformers.CLIPTextModelWithProjection(config))
    parsed = CLIPTextWithProjectionConfig.from_hf(config.to_dict(), source="config.json")
    ours = as_network(
        reference,
        lambda rngs: CLIPTextModelWithProjection(parsed, param_dtype=jnp.float32, rngs=rngs),
    )
    return reference, ours


def prompts(padding: int = 0) -> np.ndarray:
    """Rows that end at different places, padded as Stable Diffusion XL's second tokenizer does."""
    ids = token_ids(3, 12)
    ids[:, 0] = START
    for row, end in zip(ids, (3, 7, 11), strict=True):
        row[end:] = padding
        row[end] = END
    return ids


@pytest.mark.parametrize("padding", [0, END])
@pytest.mark.parametrize("eos_token_id", [2, END])
def test_context_and_pooled_equal_transformers(eos_token_id, padding):
    reference, ours = encoders(eos_token_id)
    ids = prompts(padding)
    expected = reference(torch.tensor(ids), output_hidden_states=True)
    found = ours.call("states", ids)
    assert relative_error(found.context, expected.hidden_states[-2]) < 1e-4
    assert relative_error(found.pooled, expected.text_embeds) < 1e-4
    np.testing.assert_array_equal(found.context, ours(ids, output="penultimate"))


def test_the_projection_alone_equals_torch():
    reference, ours = encoders()
    summary = draw(3, 48)
    kernel = ours.params["text_projection"]["kernel"]
    expected = reference.text_projection(torch.tensor(summary))
    assert relative_error(summary @ kernel, expected) < 1e-5


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_from_a_cached_state_on_it_is_the_same(layer):
    _, ours = encoders()
    ids, residual = prompts(), make_residual((4,))
    hidden = ours.call("lower", ids, layer)
    found = ours.call("upper_states", hidden, ids, residual, layer)
    whole = ours.call("states", ids, residual)
    np.testing.assert_array_equal(found.context, whole.context)
    np.testing.assert_array_equal(found.pooled, whole.pooled)


def test_the_last_layer_acts_on_pooled_alone():
    """And a residual below it on both."""
    _, ours = encoders()
    plain = ours.call("states", prompts())
    last, below = (ours.call("states", prompts(), make_residual((at,))) for at in (4, 3))
    np.testing.assert_array_equal(last.context, plain.context)
    assert np.abs(last.pooled - plain.pooled).max() > 1e-3
    assert np.abs(below.context - plain.context).max() > 1e-3
    assert np.abs(below.pooled - plain.pooled).max() > 1e-3


def test_learned_vectors_stand_in_the_words_places():
    """The vectors of another token make the prompt with that token."""
    reference, ours = encoders()
    ids = prompts()
    places = np.full(ids.shape, -1, np.int32)
    places[:, 1] = 0
    vector = reference.text_model.embeddings.token_embedding.weight[[5]].numpy()
    found = ours.call("states", ids, TokenEmbeddings(vector), places)
    ids[:, 1] = 5
    expected = reference(torch.tensor(ids), output_hidden_states=True)
    assert relative_error(found.context, expected.hidden_states[-2]) < 1e-4
    assert relative_error(found.pooled, expected.text_embeds) < 1e-4


def test_gradients_to_a_residual_equal_torch_autograd():
    """Keys and values that torch concatenates by itself, through context and pooled."""
    reference, ours = encoders()
    ids, residual, layers = prompts(), make_residual((2, 4)), (2, 4)
    weights = draw(3, 12, 48, seed=1), draw(3, 40, seed=2)
    given = [torch.tensor(array, requires_grad=True) for array in (residual.key, residual.value)]
    patched = [reference.text_model.encoder.layers[layer].self_attn for layer in layers]
    for row, module in enumerate(patched):
        module.forward = functools.partial(
            concatenated_attention, module, given[0][row], given[1][row]
        )
    try:
        out = reference(torch.tensor(ids), output_hidden_states=True)
    finally:
        for module in patched:
            del module.forward
    loss = (out.hidden_states[-2] * torch.tensor(weights[0])).sum()
    (loss + (out.text_embeds * torch.tensor(weights[1])).sum()).backward()

    @jax.jit
    @jax.grad
    def gradient(residual, encoder):
        found = encoder.call("states", ids, residual)
        return (found.context * weights[0]).sum() + (found.pooled * weights[1]).sum()

    found = gradient(residual, ours)
    assert relative_error(found.key, given[0].grad) < 1e-3
    assert relative_error(found.value, given[1].grad) < 1e-3


def test_refused():
    _, ours = encoders()
    hidden = ours.call("lower", prompts(), 5)
    with pytest.raises(CatVersionError, match=r"layer=5: must be within 0\.\.4"):
        ours.call("upper_states", hidden, prompts(), None, 5)
    with pytest.raises(CatVersionError, match=r"layers \(7,\)"):
        ours.call("states", prompts(), make_residual((7,)))
    config = SIZES | {"model_type": "clip_text_model", "projection_dim": 0}
    with pytest.raises(CatVersionError, match="projection_dim = 0"):
        CLIPTextWithProjectionConfig.from_hf(config, source="config.json")


@pytest.mark.slow  # 32 layers are traced
def test_the_published_configuration_makes_the_published_number_of_parameters():
    """text_encoder_2/config.json of stable-diffusion-xl-base-1.0."""
    published = SDXL_TEXT_ENCODER_2 | {"model_type": "clip_text_model", "vocab_size": 49408}
    config = CLIPTextWithProjectionConfig.from_hf(published, source="config.json")
    network = abstract_network(
        lambda rngs: CLIPTextModelWithProjection(config, param_dtype=jnp.float32, rngs=rngs)
    )
    with torch.device("meta"):
        reference = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**published)
        )
    expected = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(network.params)) == expected == 694_659_840
