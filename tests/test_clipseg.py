"""CLIPSeg masks against transformers' own network, on a tiny random folder of the real layout."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="CLIPSeg is torch: pip install '.[test]'")

from tiny_pipelines import tiny_tokenizer  # noqa: E402

from catversion_jax.cli import main  # noqa: E402
from catversion_jax.errors import CatVersionError  # noqa: E402
from catversion_jax.integrations.clipseg import load_clipseg  # noqa: E402

SIDE = 32


def rewritten(folder, copy, **values):
    """A copy of a folder with other values in its configuration; ``part.key`` is inside a part."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for key, value in values.items():
        part, _, inner = key.partition("__")
        if inner:
            config[part][inner] = value
        else:
            config[part] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def clipseg_folder(tmp_path_factory):
    """Config, safetensors, processor and tokenizer, as CIDAS/clipseg-rd64-refined has them."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        ViTImageProcessor,
    )

    folder = tmp_path_factory.mktemp("clipseg")
    tokenizer = tiny_tokenizer(folder / "tokenizer", context=24)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPSegConfig(
        text_config=tower
        | ids
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
        | {"pad_token_id": tokenizer.eos_token_id},
        vision_config=tower | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    torch.manual_seed(0)
    model = CLIPSegForImageSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    image_processor = ViTImageProcessor(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    CLIPSegProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@torch.no_grad()
def probabilities(folder, pixels, words):
    """All images at once through the plain network, at its own size."""
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation

    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    return torch.sigmoid(model(pixel_values=images, **tokens).logits).numpy()


def test_masks_are_transformers_probabilities_above_the_threshold(clipseg_folder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    words = ["cup", "stuffed animal", "dog"]
    expected = probabilities(clipseg_folder, pixels, words)
    threshold = float(np.median(expected))
    masks = load_clipseg(clipseg_folder, threshold=threshold)(pixels, words)
    assert masks.dtype == np.uint8
    certain = np.abs(expected - threshold) > 1e-4
    np.testing.assert_array_equal((masks > 0)[certain], (expected > threshold)[certain])
    assert 0.3 < (masks == 255).mean() < 0.7
    assert certain.mean() > 0.99


def test_other_sizes_are_resized_there_and_back(clipseg_folder):
    pixels = np.random.default_rng(1).integers(0, 256, (1, 48, 64, 3), np.uint8)
    assert load_clipseg(clipseg_folder)(pixels, ["cup"]).shape == (1, 48, 64)


def test_what_is_no_clipseg_is_named(clipseg_folder, tiny_sd_folder, tmp_path):
    with pytest.raises(CatVersionError, match=r"no config\.json.*CLIPSegForImageSegmentation"):
        load_clipseg(tmp_path)
    with pytest.raises(CatVersionError, match="is a 'clip_text_model', no CLIPSeg"):
        load_clipseg(tiny_sd_folder / "text_encoder")
    with pytest.raises(CatVersionError, match=r"threshold=1\.5: must be between 0 and 1"):
        load_clipseg(clipseg_folder, threshold=1.5)
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(CatVersionError, match="1 base classes for 2 images"):
        load_clipseg(clipseg_folder)(pixels, ["cup"])


def test_the_command_uses_it(clipseg_folder, tmp_path, capsys):
    folder = tmp_path / "cup"
    folder.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    sheets = str(tmp_path / "sheets")
    arguments = ["masks", str(folder), "--base_class", "cup", "--output_dir", sheets]
    threshold = float(np.median(probabilities(clipseg_folder, pixels[None], ["cup"])))
    code = main([*arguments, "--clipseg", str(clipseg_folder), "--threshold", f"{threshold}"])
    assert code == 0
    (expected,) = load_clipseg(clipseg_folder, threshold=threshold)(pixels[None], ["cup"])
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "1.mask.png")), expected)
    # options of the other source are refused, not ignored
    assert main([*arguments, "--clipseg", str(clipseg_folder), "--num_draws", "3"]) == 2
    assert "--num_draws: is an option of --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("text_config__num_hidden_layers", [10**9, 0, -1, "3", None, [3], 1.5, True]),
        ("vision_config__hidden_size", [10**9, 0, -1, "32", None, {}]),
        ("reduce_dim", [10**9, 0, -1, "16", None, []]),
        ("vision_config", [5, "x", [1], True]),
        ("extract_layers", ["x", 5, [99], [-1], ["0"], [None], [[0]]]),
    ],
)
def test_sizes_are_checked_before_anything_is_built(clipseg_folder, tmp_path, key, values):
    for number, value in enumerate(values):
        folder = rewritten(clipseg_folder, tmp_path / str(number), **{key: value})
        with pytest.raises(CatVersionError, match=key.split("__")[-1]):
            load_clipseg(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config__hidden_act": 5}, "cannot be read"),
        ({"decoder_num_attention_heads": 3}, "must divide reduce_dim"),
        ({"vision_config__num_hidden_layers": 4}, "lack 16 tensors"),  # would be random numbers
    ],
)
def test_what_transformers_says_or_does_not_say(clipseg_folder, tmp_path, values, message):
    folder = rewritten(clipseg_folder, tmp_path / "copy", **values)
    with pytest.raises(CatVersionError, match=message) as caught:
        load_clipseg(folder)
    assert "\n" not in str(caught.value)
