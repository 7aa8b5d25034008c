"""Full-size text encoders with random weights against transformers: ``pytest -m slow -s``.

The figures are in docs/results/parity.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_reference import TEXT_ENCODERS, as_network, draw, nchw, randomise, relative_error

from catversion_jax.models.clip.encoder import CLIPEncoderLayer
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel, causal_bias
from catversion_jax.models.clip.vision import CLIPVisionConfig, CLIPVisionModel
from catversion_jax.models.weights.network import Network, abstract_network


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder(name, capsys):
    reference = randomise(
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODERS[name]))
    )
    config = CLIPTextConfig.from_hf(reference.config.to_dict(), source=name)
    ours = as_network(
        reference, lambda rngs: CLIPTextModel(config, param_dtype=jnp.float32, rngs=rngs)
    )
    ids = np.random.default_rng(0).integers(0, 49406, (2, 77), dtype=np.int32)
    expected = reference(torch.tensor(ids), output_hidden_states=True)
    states = [state.numpy() for state in expected.hidden_states]
    graphdef = abstract_network(
        lambda rngs: CLIPEncoderLayer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
    ).graphdef
    layer = jax.jit(Network.__call__)
    layers = [
        relative_error(layer(Network(params, graphdef), states[i], causal_bias(77)), states[i + 1])
        for i, params in ours.params["encoder"]["layers"].items()
    ]
    encode = jax.jit(Network.__call__, static_argnames="output")
    last = relative_error(encode(ours, ids), expected.last_hidden_state)
    penultimate = relative_error(encode(ours, ids, output="penultimate"), states[-2])
    with capsys.disabled():
        report(f"{name} text encoder", max(layers), last, penultimate)
    assert len(layers) == TEXT_ENCODERS[name]["num_hidden_layers"]
    assert max(layers) < 1e-5
    assert last < 1e-4
    assert penultimate < 1e-4


@pytest.mark.slow
def test_vision_encoder_of_the_score(capsys):
    """CLIP ViT-B/32, whose sizes are transformers' defaults."""
    reference = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig()))
    config = CLIPVisionConfig.from_hf(reference.config.to_dict(), source="ViT-B/32")
    ours = as_network(
        reference, lambda rngs: CLIPVisionModel(config, param_dtype=jnp.float32, rngs=rngs)
    )
    pixels = draw(2, 224, 224, 3)
    pooled = jax.jit(Network.call, static_argnums=1)(ours, "pooled", pixels)
    error = relative_error(pooled, reference(nchw(pixels)).pooler_output)
    with capsys.disabled():
        report("ViT-B/32 vision encoder", error)
    assert error < 1e-4


def report(what: str, *figures: float) -> None:
    """The figures of a run by hand."""
    print(f"\n{what}: " + ", ".join(f"{figure:.1e}" for figure in figures))  # noqa: T201
