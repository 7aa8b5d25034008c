"""Images that an earlier evaluation has drawn are kept only where they would be drawn the same."""

import dataclasses
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from catversion_jax.config.sampling import sampling_settings
from catversion_jax.evaluation.generation import PlannedImage, draw_missing
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.sampling.requests import ImageRequest

SETTINGS = sampling_settings(num_inference_steps=2, batch_size=1)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_another_model_at_the_same_place_draws_again(one_block_sd_folder, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(one_block_sd_folder, folder)
    planned = [PlannedImage(tmp_path / "cup" / "a-cup_0.png", ImageRequest("a cup", (), 0))]
    assert draw_missing(load_backbone(folder), planned, SETTINGS) == 1
    assert draw_missing(load_backbone(folder), planned, SETTINGS) == 0
    before = planned[0].path.read_bytes()
    (file,) = (folder / part).glob("*.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file)
    changed = load_backbone(folder)
    assert draw_missing(changed, planned, SETTINGS) == 1
    assert planned[0].path.read_bytes() != before
    assert draw_missing(changed, planned, SETTINGS) == 0


def test_another_width_of_numbers_draws_again(one_block_sd_folder, tmp_path):
    planned = [PlannedImage(tmp_path / "cup" / "a-cup_0.png", ImageRequest("a cup", (), 0))]
    for dtype in ("float32", "bfloat16"):
        backbone = load_backbone(one_block_sd_folder, dtype=dtype)
        assert draw_missing(backbone, planned, SETTINGS) == 1
    noisier = dataclasses.replace(backbone, digests={**backbone.digests, "scheduler": "another"})
    assert draw_missing(noisier, planned, SETTINGS) == 1
