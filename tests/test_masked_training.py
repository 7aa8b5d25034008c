"""``masked_training`` from mask files to losses, against the weighting in closed form; its errors.

The same run takes an absurd step, so that what is not finite is seen too.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import final_files, metrics, run_here

from catversion_jax import load_concept
from catversion_jax.cli import main

SIDE = 16  # the model's own resolution: nothing is scaled
OUTSIDE = 0.2
LEFT = np.repeat([[255] * 8 + [0] * 8], SIDE, axis=0).astype(np.uint8)
# Of equal photos, prompts, seeds and start values: they differ in their masks only.
MASKS = {
    "left": LEFT,
    "right": 255 - LEFT,
    "white": np.full_like(LEFT, 255),
    # 0.4 on the right, of its mean: two values alone would count as black and white
    "grey": np.where(LEFT, 255, np.indices(LEFT.shape).sum(0) % 2 * 2 + 101).astype(np.uint8),
}


def write_concept(folder: Path, mask: np.ndarray | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "concept.json").write_text(json.dumps({"base_class": "cup", "seed": 5}))
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if mask is not None:
            Image.fromarray(mask).save(folder / f"{index}.mask.png")
    return folder


def masked(model: Path, concepts: Path, output: Path, **options: object) -> int:
    return run_here(model, concepts, output, masked_training="true", **options)


@pytest.fixture(scope="module")
def diverging(one_block_sd_folder: Path, made_once: Callable[..., Path]) -> Path:
    """All concepts in one run; the learning rate makes the second loss overflow."""

    def train(folder: Path) -> None:
        for name, mask in MASKS.items():
            write_concept(folder / "concepts" / name, mask)
        options = {
            "unmasked_weight": OUTSIDE,
            "learning_rate": 1e38,
            "random_flip": 0.5,
            "logging_steps": 1,
            "mask_polarity": "white",  # else the one that is white everywhere is refused
        }
        assert masked(one_block_sd_folder, folder / "concepts", folder / "out", **options) == 3

    return made_once("diverging", train) / "out"


def test_the_loss_is_weighted_by_the_masks(diverging: Path) -> None:
    """Equation (4) of objective.py is linear in the errors of the two halves of a photo."""
    loss = {}
    for name in MASKS:
        (first,) = (row for row in metrics(diverging / "concepts" / name) if row["step"] == "1")
        loss[name] = float(first["loss"])
    # left = (a + w b) / (1 + w), right = (b + w a) / (1 + w), with a and b the halves' own losses
    a, b = np.linalg.solve(
        [[1, OUTSIDE], [OUTSIDE, 1]],
        np.array([loss["left"], loss["right"]]) * (1 + OUTSIDE),
    )
    assert abs(a - b) > 0.01 * (a + b)  # else nothing is shown
    assert loss["white"] == pytest.approx((a + b) / 2, rel=1e-4)
    assert loss["grey"] == pytest.approx((a + 0.4 * b) / 1.4, rel=1e-4)


def test_a_loss_that_is_not_finite_quarantines_and_keeps_the_last_finite_state(
    diverging: Path,
) -> None:
    assert not final_files(diverging)
    for name in MASKS:
        folder = diverging / "concepts" / name
        assert "not finite at step" in (folder / "FAILED.txt").read_text()
        kept = load_concept(next(folder.glob("catversion-*.safetensors"))).learned
        assert np.isfinite(kept.key).all()
        assert np.isfinite(kept.value).all()
        assert np.abs(kept.key).max() > 1e30  # after the absurd step, not before it


def test_an_image_without_a_mask_is_named(one_block_sd_folder: Path, tmp_path: Path) -> None:
    folder = write_concept(tmp_path / "cup", LEFT)
    (folder / "1.mask.png").unlink()
    assert masked(one_block_sd_folder, folder, tmp_path / "out") == 3
    reason = (tmp_path / "out" / "concepts" / "cup" / "FAILED.txt").read_text()
    assert "masked_training=true, but 1 of 3 images have no mask (1.png)" in reason
    assert "catversion masks" in reason


def test_preserving_needs_masks_too(one_block_sd_folder: Path, tmp_path: Path) -> None:
    folder = write_concept(tmp_path / "cup", None)
    assert run_here(one_block_sd_folder, folder, tmp_path / "out", preserve_weight=0.5) == 3
    reason = (tmp_path / "out" / "concepts" / "cup" / "FAILED.txt").read_text()
    assert "preserve_weight=0.5, but 3 of 3 images have no mask (0.png, 1.png, 2.png)" in reason
    assert "catversion masks" in reason
    assert "use alpha=mask or preserve_weight=0" in reason


def test_masks_that_training_makes_are_those_of_the_command(
    one_block_sd_folder: Path, tmp_path: Path
) -> None:
    """The run whose masks ``catversion masks`` wrote beside the photos learns the same numbers."""
    options = {"preserve_weight": 1, "mask_polarity": "white"}
    learned = []
    for name in ("made", "written"):
        folder = write_concept(tmp_path / name / "cup", None)
        Image.fromarray(LEFT).save(folder / "1.mask.png")  # what was given stays
        # a photo in which there is nothing to find
        Image.fromarray(np.full((SIDE, SIDE, 3), 127, np.uint8)).save(folder / "2.png")
        if name == "written":
            sheets = ["--output_dir", str(tmp_path / "sheets")]
            assert main(["masks", str(folder), "--model", str(one_block_sd_folder), *sheets]) == 0
        output, options["make_masks"] = tmp_path / name / "out", name == "made"
        assert run_here(one_block_sd_folder, folder, output, **options) == 0
        learned.append(load_concept(output / "concepts" / "cup"))
    made, written = learned
    np.testing.assert_array_equal(made.learned.key, written.learned.key)
    np.testing.assert_array_equal(made.learned.value, written.learned.value)
    assert [bool(digest) for digest in made.train_config["digests"]["masks"]] == [
        False,
        True,
        False,
    ]
    folder, options["make_masks"] = tmp_path / "made", True
    assert run_here(one_block_sd_folder, folder / "cup", folder / "out", **options) == 0


def test_an_inpainting_model_makes_no_masks(
    one_block_inpainting_folder: Path, tmp_path: Path
) -> None:
    folder = write_concept(tmp_path / "cup", None)
    options = {"preserve_weight": 1, "make_masks": True}
    assert run_here(one_block_inpainting_folder, folder, tmp_path / "out", **options) == 3
    reason = (tmp_path / "out" / "concepts" / "cup" / "FAILED.txt").read_text()
    assert "catversion masks makes them with the text-to-image model of the same family" in reason


def test_an_empty_mask_leaves_no_loss(one_block_sd_folder: Path, tmp_path: Path) -> None:
    folder = write_concept(tmp_path / "cup", LEFT)
    Image.fromarray(np.zeros_like(LEFT)).save(folder / "2.mask.png")
    options = {"unmasked_weight": 0, "mask_polarity": "white"}
    assert masked(one_block_sd_folder, folder, tmp_path / "out", **options) == 3
    reason = (tmp_path / "out" / "concepts" / "cup" / "FAILED.txt").read_text()
    assert "with unmasked_weight=0 an image whose mask is empty" in reason
    assert "use a weight above 0" in reason


def test_masks_that_look_wrong_are_refused(one_block_sd_folder: Path, tmp_path: Path) -> None:
    inverted = np.zeros_like(LEFT)
    inverted[[0, -1]], inverted[:, [0, -1]] = 255, 255
    wrong = {"empty": np.zeros_like(LEFT), "inverted": inverted}
    for name, mask in wrong.items():
        write_concept(tmp_path / "concepts" / name, mask)
    assert masked(one_block_sd_folder, tmp_path / "concepts", tmp_path / "out") == 3
    run = tmp_path / "out" / "concepts"
    for name, reason in (("empty", "is empty"), ("inverted", "white along the whole border")):
        message = (run / name / "FAILED.txt").read_text()
        assert (
            "masked_training=true, but 3 of 3 masks look wrong (0.png, 1.png, 2.png: the mask"
            in message
        )
        assert reason in message
        assert '"mask_polarity"' in message
