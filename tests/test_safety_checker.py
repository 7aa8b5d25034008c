"""The safety checker of a model folder: what diffusers' own pipeline flags with it, we flag."""

import json
import shutil

import numpy as np
import pytest

from catversion_jax.config.model import ModelOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.serving import safety

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import add_safety_checker  # noqa: E402

from catversion_jax.integrations.safety_checker import load_safety_checker  # noqa: E402


@pytest.fixture
def folder(one_block_sd_folder, tmp_path):
    return shutil.copytree(one_block_sd_folder, tmp_path / "model")


def of_model(folder):
    return safety.find_checker(ModelOptions(pretrained_model_name_or_path=str(folder)))


def test_what_diffusers_flags_is_flagged(folder):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8) // rng.integers(
        1, 9, (12, 1, 1, 1)
    )
    pixels = pixels.astype(np.uint8)
    found = set()
    for threshold in (0.0, 0.1, 0.2, 0.3, 0.4):
        add_safety_checker(folder, threshold)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        images = [one.astype(np.float32) / 255 for one in pixels]
        blackened, theirs = pipe.run_safety_checker(np.stack(images), "cpu", torch.float32)
        checker, said = of_model(folder)
        assert said == "the model's own"
        assert checker(pixels) == theirs
        assert [checker(one[None])[0] for one in pixels] == theirs
        assert [not one.any() for one in blackened] == theirs
        found |= set(theirs)
    assert found == {True, False}


def test_it_is_said_when_none_runs(folder, monkeypatch):
    assert of_model(folder) == (None, "none: the model has no safety checker")
    assert of_model("tiny-sd")[1] == "none: the model has no safety checker"
    add_safety_checker(folder)
    monkeypatch.setattr(safety, "NEEDED", ("no_such_package",))
    assert "needs no_such_package, not installed here; pip install" in of_model(folder)[1]
    monkeypatch.undo()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CatVersionError, match="cannot be read"):
        of_model(folder)
    shutil.rmtree(folder / "feature_extractor")
    with pytest.raises(CatVersionError, match="has no folder feature_extractor"):
        load_safety_checker(folder)
    shutil.rmtree(folder / "safety_checker")
    checker, said = of_model(folder)
    assert checker is None
    assert "download the whole model" in said
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"]
