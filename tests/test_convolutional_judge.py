"""The judge of the embedded world, against the torch network that is trained."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_reference import relative_error

from catversion_jax.assets import EMBEDDED_JUDGE, EXAMPLE_CONCEPTS, embedded_folder
from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError
from catversion_jax.models.convolutional_judge import load_convolutional_judge
from catversion_jax.models.embedders import DinoEmbedder

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "tiny_sd"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """With batch norms that do something, and its folder."""
    sys.path.insert(0, str(TOOLS))
    try:
        from train_judge import Judge, export
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    network = Judge({"class": 3}, widths=(8, 16))
    with torch.no_grad():
        for layer in network.body:
            if isinstance(layer, torch.nn.BatchNorm2d):
                for tensor in (layer.weight, layer.bias, layer.running_mean):
                    tensor.normal_(0.5, 0.5)
                layer.running_var.uniform_(0.5, 2.0)
    network.eval()
    images = torch.rand(32, 3, 32, 32) * 2 - 1
    folder = tmp_path_factory.mktemp("judge")
    export(network, images, folder, world="none")
    return network, images, folder


def test_equals_torch(judge) -> None:
    reference, images, folder = judge
    network, size = load_convolutional_judge(folder)
    assert size == 32
    with torch.no_grad():
        features = reference.features(images)
        expected = features - features.mean(0)
    pixels = images.permute(0, 2, 3, 1).numpy()
    assert relative_error(network.call("image_embeds", pixels), expected) < 1e-4


def test_evaluate_takes_it(judge) -> None:
    reference, images, folder = judge
    embedder = DinoEmbedder(folder)
    assert (embedder.kind, embedder.judges_objects) == ("judge", True)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(np.asarray(Image.fromarray(picture))).permute(2, 0, 1)[None]
    with torch.no_grad():
        vector = reference.features(pixels / 127.5 - 1) - reference.features(images).mean(0)
    expected = torch.nn.functional.normalize(vector)[0].numpy()
    assert np.abs(embedder.images([picture])[0] - expected).max() < 1e-4


def test_the_one_that_ships_tells_individuals_apart(tmp_path):
    """Each example's last photo, as if it were drawn, is nearest to its own other photos."""
    names = sorted(folder.name for folder in embedded_folder(EXAMPLE_CONCEPTS).iterdir())
    for name in names:
        photos, drawn = tmp_path / "photos" / name, tmp_path / "images" / name
        shutil.copytree(embedded_folder(EXAMPLE_CONCEPTS) / name, photos)
        (photos / "concept.json").write_text('{"base_class": "toy"}')
        drawn.mkdir(parents=True)
        for kind in ("", ".mask"):
            (photos / f"5{kind}.png").rename(drawn / f"0_0{kind}.png")
    (tmp_path / "prompts.txt").write_text("a {} on a red background\n")
    command = ["evaluate", tmp_path / "images", "--concepts", tmp_path / "photos", "--gallery"]
    command += ["--prompts", tmp_path / "prompts.txt", "--dino", EMBEDDED_JUDGE]
    command += ["--clip", embedded_folder("tiny-sd") / "clip"]
    assert main([str(word) for word in command]) == 0
    found = json.loads((tmp_path / "images/evaluation/scores.json").read_text())
    (gallery,) = found["galleries"]["images"]
    assert (gallery["judge"], gallery["view"], gallery["photos"]) == ("judge", "object alone", 24)
    found = {name: one["mean_average_precision"] for name, one in gallery["concepts"].items()}
    assert found == dict.fromkeys(names, 1.0)


def test_the_one_that_ships_is_small_and_says_its_world():
    folder = embedded_folder(EMBEDDED_JUDGE)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3e6
    assert json.loads((folder / "config.json").read_text())["world"].startswith("tiny_sd sha256 ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, r"is a 'vit', not a catversion_judge.*train_judge.py --export"),
        ({"widths": []}, r"widths=\[\]"),
        ({"widths": [8, "16"]}, r"widths="),
        ({"widths": [8]}, r"unexpected:"),
        ({"image_size": 2}, r"image_size"),
    ],
)
def test_what_does_not_fit_is_said(judge, change: dict, message: str, tmp_path: Path) -> None:
    for file in judge[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CatVersionError, match=message):
        load_convolutional_judge(tmp_path)
