"""CLIP's text encoder against transformers' CLIPTextModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_networks import (
    SIZES,
    default_encoders,
    our_config,
    our_encoder,
    token_ids,
    torch_encoder,
)
from torch_reference import draw, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.encoder import CLIPEncoderLayer
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.layers.attention import attention
from catversion_jax.models.weights.convert import convert_state_dict
from catversion_jax.models.weights.network import Network, abstract_network, random_network


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_equals_transformers(hidden_act):
    reference = torch_encoder(hidden_act=hidden_act)
    ours = our_encoder(reference)
    for length in (20, 7):
        ids = token_ids(3, length)
        expected = reference(torch.tensor(ids), output_hidden_states=True)
        assert relative_error(ours(ids), expected.last_hidden_state) < 1e-4
        assert relative_error(ours(ids, output="penultimate"), expected.hidden_states[-2]) < 1e-4


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_each_layer_equals_transformers(hidden_act):
    """Every part alone, on the same input."""
    reference = torch_encoder(hidden_act=hidden_act)
    config = our_config(reference)
    ours = our_encoder(reference)
    ids = token_ids(2, 20)
    states = reference(torch.tensor(ids), output_hidden_states=True).hidden_states
    assert relative_error(ours.call("lower", ids, 0), states[0]) < 1e-5
    graphdef = abstract_network(
        lambda rngs: CLIPEncoderLayer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
    ).graphdef
    for layer in range(config.num_hidden_layers):
        # One layer from the torch model's own state: the difference of depth layer + 1 alone.
        block = Network(ours.params["encoder"]["layers"][layer], graphdef)
        bias = np.triu(np.full((20, 20), -np.inf, np.float32), 1)[None, None]
        assert relative_error(block(states[layer].numpy(), bias), states[layer + 1]) < 1e-5


@pytest.mark.parametrize("eos_token_id", [98, 2])
def test_pooled_state_is_that_of_the_end_token(eos_token_id):
    """2 is what configurations before transformers 4.31 say, and means "the highest id"."""
    reference = torch_encoder(eos_token_id=eos_token_id)
    ours = our_encoder(reference)
    ids = token_ids(4, 12)
    ids[:, 0], ids[0, 3], ids[1, 7], ids[2, 5], ids[3, 11] = 97, 98, 98, 98, 98
    ids[0, 8], ids[2, 2] = 98, 2  # padding with the end token; a real token of id 2
    expected = reference(torch.tensor(ids)).pooler_output
    assert relative_error(ours.call("pooled", ours(ids), ids), expected) < 1e-4


def test_lower_then_upper_is_the_whole():
    _, ours = default_encoders()
    ids = token_ids(2, 20)
    for layer in range(6):
        hidden = ours.call("lower", ids, layer)
        np.testing.assert_array_equal(ours.call("upper", hidden, None, layer), ours(ids))


def test_keys_and_values_are_those_transformers_computes():
    reference = torch_encoder()
    seen = {}
    inner = getattr(reference, "text_model", reference)  # transformers 4
    for index, layer in enumerate(inner.encoder.layers):
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda module, args, out, at=(index, name): seen.__setitem__(at, out)
            )
    ids = token_ids(2, 20)
    reference(torch.tensor(ids))
    keys, values = our_encoder(reference).call("keys_values", ids, (1, 4))
    assert keys.shape == (2, 2, 20, 6, 8)
    for row, layer in enumerate((1, 4)):
        assert relative_error(keys[row].reshape(2, 20, 48), seen[layer, "k_proj"]) < 1e-4
        assert relative_error(values[row].reshape(2, 20, 48), seen[layer, "v_proj"]) < 1e-4


def test_is_an_argument_of_a_jitted_function_and_compiles_once():
    config = CLIPTextConfig(48, 80, 2, 6, vocab_size=99, max_position_embeddings=20)
    make = lambda rngs: CLIPTextModel(config, param_dtype=jnp.float32, rngs=rngs)  # noqa: E731
    traces = []

    @jax.jit
    def encode(network, ids):
        traces.append(1)
        return network(ids)

    ids = token_ids(1, 20)
    first, second = random_network(make, seed=1), random_network(make, seed=2)
    np.testing.assert_allclose(encode(first, ids), first(ids), atol=1e-5)
    np.testing.assert_allclose(encode(second, ids), second(ids), atol=1e-5)
    assert len(traces) == 1


def test_random_networks_are_of_the_usual_size_and_a_function_of_the_seed():
    config = CLIPTextConfig(48, 80, 2, 6, vocab_size=990, max_position_embeddings=20)
    make = lambda rngs: CLIPTextModel(config, param_dtype=jnp.float32, rngs=rngs)  # noqa: E731
    first, again, other = (random_network(make, seed).params for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    layer, other_layer = (params["encoder"]["layers"][1] for params in (first, other))
    kernel = layer["mlp"]["fc2"]["kernel"]
    assert not np.array_equal(kernel, other_layer["mlp"]["fc2"]["kernel"])
    # variance 1 / fan-in, within four standard errors of an estimate from n numbers
    for values, fan_in in (
        (kernel, 80),
        (layer["mlp"]["fc1"]["kernel"], 48),
        (first["embeddings"]["token_embedding"]["embedding"], 48),
    ):
        assert abs(np.var(values) * fan_in - 1) < 4 * np.sqrt(2 / values.size)
    assert np.array_equal(layer["layer_norm1"]["scale"], np.ones(48))
    assert np.array_equal(layer["layer_norm1"]["bias"], np.zeros(48))
    assert np.array_equal(layer["mlp"]["fc1"]["bias"], np.zeros(80))


def test_bfloat16_computes_in_bfloat16_close_to_float32():
    reference = torch_encoder()
    config = our_config(reference)
    half = convert_state_dict(
        reference.state_dict(),
        abstract_network(
            lambda rngs: CLIPTextModel(
                config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
            )
        ),
        dtype=jnp.bfloat16,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    ids = token_ids(2, 20)
    out = half(ids)
    assert out.dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa; five layers of them
    assert (
        relative_error(out.astype(jnp.float32), reference(torch.tensor(ids)).last_hidden_state)
        < 0.05
    )


def test_attention_equals_torch():
    query, key, value = (draw(2, 5, 3, 8, seed=s) for s in range(3))
    bias = draw(2, 1, 5, 5, seed=3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(a).transpose(1, 2) for a in (query, key, value)),
        attn_mask=torch.tensor(bias),
        scale=0.2,
    )
    ours = attention(query, key, value, bias=bias, scale=0.2)
    assert relative_error(ours, expected.transpose(1, 2)) < 1e-5


def test_prompt_longer_than_the_encoder():
    _, ours = default_encoders()
    with pytest.raises(CatVersionError, match=r"21 tokens.*20 positions.*Truncate"):
        ours(token_ids(1, 21))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r'hidden_act = "relu" \(supported: "quick_gelu" or "gelu"\)'),
        ({"rope_theta": 10000.0}, r"rope_theta = 10000.0 \(unknown key\)"),
        ({"model_type": "t5"}, r'model_type = "t5"'),
        ({"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\]"),
    ],
)
def test_config_key_that_changes_the_computation_is_refused(change, message):
    with pytest.raises(CatVersionError, match=message):
        CLIPTextConfig.from_hf(
            SIZES | {"add_cross_attention": False} | change, source="config.json"
        )


def test_all_refused_keys_are_named_at_once():
    with pytest.raises(CatVersionError) as error:
        CLIPTextConfig.from_hf(
            {"hidden_act": "relu", "rotary": True, "prefix_tuning": [1]}, source="a/config.json"
        )
    assert all(
        word in str(error.value) for word in ("a/config.json", "hidden_act", "rotary", "tuning")
    )
