"""CLIP's vision encoder and its two projections against transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_reference import as_network, draw, nchw, randomise, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.encoder import CLIPEncoderLayer
from catversion_jax.models.clip.vision import CLIPVisionConfig, CLIPVisionModel, load_clip
from catversion_jax.models.weights.network import Network, abstract_network

VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 20,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_vision_equals_transformers(hidden_act):
    reference = randomise(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION, hidden_act=hidden_act))
    )
    config = CLIPVisionConfig.from_hf(reference.config.to_dict(), source="config.json")
    ours = as_network(
        reference, lambda rngs: CLIPVisionModel(config, param_dtype=jnp.float32, rngs=rngs)
    )
    pixels = draw(2, 32, 32, 3)
    expected = reference(nchw(pixels), output_hidden_states=True)
    assert relative_error(ours(pixels), expected.last_hidden_state) < 1e-4
    assert relative_error(ours.call("pooled", pixels), expected.pooler_output) < 1e-4
    graphdef = abstract_network(
        lambda rngs: CLIPEncoderLayer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
    ).graphdef
    states = expected.hidden_states
    for layer in range(4):
        block = Network(ours.params["encoder"]["layers"][layer], graphdef)
        assert relative_error(block(states[layer].numpy()), states[layer + 1]) < 1e-5


def save_clip(folder, *, eos_token_id: int = 98) -> transformers.CLIPModel:
    config = transformers.CLIPConfig(
        text_config=TEXT | {"eos_token_id": eos_token_id}, vision_config=VISION, projection_dim=24
    )
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("eos_token_id", [98, 2])
def test_both_embeddings_equal_transformers(tmp_path, eos_token_id):
    reference = save_clip(tmp_path, eos_token_id=eos_token_id)
    ours = load_clip(tmp_path)
    pixels = draw(3, 32, 32, 3)
    ids = np.random.default_rng(0).integers(0, 97, (3, 11), dtype=np.int32)
    ids[0, 4], ids[1, 10], ids[2, 6:] = 98, 98, 98
    expected = reference(input_ids=torch.tensor(ids), pixel_values=nchw(pixels))
    image, text = ours.call("image_embeds", pixels), ours.call("text_embeds", ids)
    unit = [np.asarray(e) / np.linalg.norm(e, axis=-1, keepdims=True) for e in (image, text)]
    assert relative_error(unit[0], expected.image_embeds) < 1e-4
    assert relative_error(unit[1], expected.text_embeds) < 1e-4
    features = reference.vision_model(nchw(pixels)).pooler_output
    assert relative_error(image, reference.visual_projection(features)) < 1e-4


def test_old_config_with_text_config_dict_and_missing_keys(tmp_path):
    """laion's files give only what differs from the defaults, twice; transformers lets ``_dict``
    win.
    """
    reference = save_clip(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    # initializer_range and eos_token_id are gone, and the plain entry is wrong
    config["text_config_dict"] = {name: config["text_config"][name] for name in TEXT}
    config["text_config"] = config["text_config"] | {"hidden_act": "gelu"}
    del config["vision_config"]["layer_norm_eps"], config["vision_config"]["num_channels"]
    path.write_text(json.dumps(config))
    again = transformers.CLIPModel.from_pretrained(tmp_path)
    ids = np.full((1, 5), 98, np.int32)
    expected = again.text_projection(again.text_model(torch.tensor(ids)).pooler_output)
    assert relative_error(load_clip(tmp_path).call("text_embeds", ids), expected.detach()) < 1e-4
    assert (
        again.config.text_config.hidden_act
        == reference.config.text_config.hidden_act
        == "quick_gelu"
    )


def test_wrong_image_size_and_layout(tmp_path):
    save_clip(tmp_path)
    ours = load_clip(tmp_path)
    with pytest.raises(CatVersionError, match=r"64x64 pixels: this CLIP takes 32x32.*Resize"):
        ours.call("image_embeds", draw(1, 64, 64, 3))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"image_size": [32, 16]}, r"vision_config: image_size = \[32, 16\]"),
        ("vision_config", {"registers": 4}, r"registers = 4 \(unknown key\)"),
        ("text_config", {"hidden_act": "silu"}, r"text_config: .*\n.*hidden_act"),
    ],
)
def test_unsupported_configuration_names_key_and_part(tmp_path, part, change, message):
    save_clip(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[part] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CatVersionError, match=message):
        load_clip(tmp_path)


def test_a_text_encoder_folder_is_not_a_clip(tmp_path):
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(CatVersionError, match="clip_text_model"):
        load_clip(tmp_path)
