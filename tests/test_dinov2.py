"""DINOv2 against transformers: the network, resized positions, the preprocessor, the scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch_reference import draw, nchw, randomise, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.models.dinov2 import bicubic_weights, load_dinov2
from catversion_jax.models.embedders import DinoEmbedder

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "mlp_ratio": 2,
    "image_size": 42,
    "patch_size": 14,
    "layerscale_value": 0.3,
}


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers"])
def dino(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))
    else:
        config = transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
        model = transformers.Dinov2WithRegistersModel(config)
    reference = randomise(model).eval()
    reference.save_pretrained(folder)
    return folder, reference


@pytest.mark.parametrize("size", [28, 70])
def test_equals_transformers_at_every_size(dino, size: int) -> None:
    folder, reference = dino
    network, image_size = load_dinov2(folder, image_size=size)
    pixels = draw(2, size, size, 3)
    with torch.no_grad():
        expected = reference(nchw(pixels)).last_hidden_state[:, 0]
    assert image_size == size
    assert relative_error(network.call("image_embeds", pixels), expected) < 1e-4


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("before", "after"), [(37, 16), (16, 37), (3, 2), (5, 5)])
def test_bicubic_weights_equal_torch(before: int, after: int, antialias: bool) -> None:
    rows = torch.eye(before)[None, None]  # the columns are the weights
    expected = torch.nn.functional.interpolate(
        rows, (after, before), mode="bicubic", align_corners=False, antialias=antialias
    )
    ours = bicubic_weights(before, after, antialias=antialias)
    assert np.abs(ours - expected[0, 0].numpy()).max() < 1e-5


def test_the_preprocessor_is_the_folders_own(dino) -> None:
    folder, reference = dino
    wanted = {"size": {"shortest_edge": 48}, "crop_size": {"height": 42, "width": 42}}
    (folder / "preprocessor_config.json").write_text(json.dumps(wanted))
    ours = DinoEmbedder(folder)
    assert ours.judges_objects
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    processor = transformers.BitImageProcessor(
        **wanted, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=3
    )
    pixels = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vector = reference(pixels).last_hidden_state[0, 0].numpy()
    expected = vector / np.linalg.norm(vector)
    assert np.abs(ours.images([picture])[0] - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_swiglu_ffn": True}, r"use_swiglu_ffn = true \(supported: false\)"),
        ({"hidden_act": "relu"}, r"hidden_act"),
        ({"image_size": 40}, r"pictures of 40 pixels hold no whole number of patches of 14"),
        ({"model_type": "clip"}, r"is a 'clip', not DINOv2.*facebook/dinov2-base"),
        ({"mlp_ratio": "4"}, r"mlp_ratio"),
        ({"num_hidden_layers": 4}, r"missing:"),
        ({"num_register_tokens": 2}, r"num_register_tokens|register_tokens"),
    ],
)
def test_what_does_not_fit_is_said(dino, change: dict, message: str, tmp_path: Path) -> None:
    folder, _ = dino
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    if "num_register_tokens" in change and "num_register_tokens" not in config:
        pytest.skip("this folder has no registers")
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CatVersionError, match=message):
        load_dinov2(tmp_path)
