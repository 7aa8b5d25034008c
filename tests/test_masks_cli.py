"""``catversion masks`` from the outside: files, what wins, comparison, messages; and that training
reads the masks.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catversion_jax.cli import main
from catversion_jax.concepts import ConceptSpec, ImageSource, read_concepts
from catversion_jax.concepts.images import decode_upright
from catversion_jax.concepts.latents import load_concept_images
from catversion_jax.concepts.mask_files import mask_paths
from catversion_jax.errors import ConceptError

SIDE = 16


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    """Two concepts: one with a given mask, one with transparency and an oblong photo."""
    cup, dog = tmp_path / "concepts" / "cup", tmp_path / "concepts" / "dog"
    for folder in (cup, dog):
        folder.mkdir(parents=True)
        (folder / "concept.json").write_text(json.dumps({"base_class": folder.name}))
    for i in range(3):
        Image.fromarray(noise(i, SIDE, SIDE, 3)).save(cup / f"{i}.png")
    Image.fromarray(np.eye(SIDE, dtype=np.uint8) * 255).save(cup / "1-masklabel.png")
    transparent = noise(7, SIDE, SIDE, 4)
    Image.fromarray(transparent).save(dog / "alpha.png")
    Image.fromarray(noise(8, 24, 40, 3)).save(dog / "photo.jpg")
    Image.fromarray(noise(9, SIDE, SIDE, 3)).save(dog / "photo.png")
    return tmp_path / "concepts"


def masks(one_block_sd_folder: Path, source: Path, *more: object) -> int:
    sheets = source.parent / "sheets"
    arguments = ["masks", source, "--model", one_block_sd_folder, "--output_dir", sheets, *more]
    return main([str(argument) for argument in arguments])


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_masks_lie_beside_the_images_and_given_ones_win(
    concepts: Path, one_block_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from catversion_jax.models.stable_diffusion import load_backbone
    from catversion_jax.sampling.class_word_masks import class_word_masks

    before = {path: path.read_bytes() for path in concepts.rglob("*.*")}
    assert masks(one_block_sd_folder, concepts) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    new = {str(path.relative_to(concepts)) for path in concepts.rglob("*.*") if path not in before}
    assert new == {
        "cup/0.mask.png",
        "cup/2.mask.png",
        "dog/alpha.mask.png",
        "dog/photo.jpg.mask.png",  # photo.png is another picture
        "dog/photo.png.mask.png",
    }
    # The same image alone, from Python, gives the same mask; transparency is taken as it is.
    (expected,) = class_word_masks(
        load_backbone(one_block_sd_folder), pixels_of(concepts / "cup/2.png")[None], ["cup"]
    )
    np.testing.assert_array_equal(pixels_of(concepts / "cup/2.mask.png"), expected)
    alpha = noise(7, SIDE, SIDE, 4)[..., 3]
    np.testing.assert_array_equal(pixels_of(concepts / "dog/alpha.mask.png"), alpha)
    assert pixels_of(concepts / "dog/photo.jpg.mask.png").shape == (24, 40)

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == ["cup", "cup", "3", "2", "1", "0"]
    assert lines[2].split()[:6] == ["dog", "dog", "3", "2", "0", "1"]
    areas = [(pixels_of(path) > 127).mean() for path in sorted((concepts / "cup").glob("*mask*"))]
    assert f"{100 * np.mean(areas):.1f} %" in lines[1]
    sheet = Image.open(lines[3])
    assert sheet.width > 15 * 128  # five times image, mask, cut-out
    assert sheet.height > 2 * 128


def test_masked_training_reads_them(concepts: Path, one_block_sd_folder: Path) -> None:
    masks(one_block_sd_folder, concepts)
    for spec in read_concepts(concepts).concepts:
        assert not spec.warnings
        for image, source in zip(
            load_concept_images(spec, resolution=SIDE), spec.images, strict=True
        ):
            assert image.mask is not None, f"{source.label} has no mask"
            if pixels_of(source.mask).shape == (SIDE, SIDE):
                np.testing.assert_allclose(image.mask, pixels_of(source.mask) / 255, atol=1e-6)


def test_listed_images_find_the_masks_beside_them(
    concepts: Path, one_block_sd_folder: Path
) -> None:
    row = {"name": "cup", "base_class": "cup", "images": ["cup/0.png", "cup/1.png"]}
    manifest = concepts / "list.json"
    manifest.write_text(json.dumps([row]))
    assert masks(one_block_sd_folder, manifest) == 0
    (spec,) = read_concepts(manifest).concepts
    found = [source.mask and source.mask.name for source in spec.images]
    assert found == ["0.mask.png", "1-masklabel.png"]


def test_overwrite_makes_all_again(concepts: Path, one_block_sd_folder: Path) -> None:
    given = concepts / "cup" / "1-masklabel.png"
    old = pixels_of(given)
    made = concepts / "cup" / "0.mask.png"
    assert masks(one_block_sd_folder, concepts) == 0
    first = pixels_of(made)
    Image.fromarray(255 - first).save(made)
    assert masks(one_block_sd_folder, concepts) == 0
    np.testing.assert_array_equal(pixels_of(made), 255 - first)
    assert masks(one_block_sd_folder, concepts, "--overwrite") == 0
    np.testing.assert_array_equal(pixels_of(made), first)
    assert (pixels_of(given) != old).any()
    assert not (concepts / "cup" / "1.mask.png").exists()
    assert set(np.unique(pixels_of(concepts / "dog" / "alpha.mask.png"))) <= {0, 255}


def test_compare_writes_nothing_and_prints_the_overlap(
    concepts: Path, one_block_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(concepts.parent.rglob("*"))
    assert masks(one_block_sd_folder, concepts, "--compare") == 3  # the dog has no mask
    assert sorted(concepts.parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert "dog: left out: no mask was given to compare with" in captured.err
    lines = captured.out.splitlines()
    assert lines[1].split()[:3] == ["cup", "cup", "1"]
    assert lines[1].split()[5] == f"{1 / SIDE:.3f}"  # a diagonal in the whole image
    assert lines[2].startswith("mean of images")
    # Masks made by the same command overlap with themselves fully.
    (concepts / "cup" / "1-masklabel.png").unlink()
    masks(one_block_sd_folder, concepts / "cup")
    capsys.readouterr()
    assert masks(one_block_sd_folder, concepts / "cup", "--compare") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[3:6] == ["3", "1.000", "1.000"]


def test_one_broken_concept_does_not_stop_the_others(
    concepts: Path, one_block_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = concepts / "cup" / "2.png"
    photo.write_bytes(photo.read_bytes()[:60])
    assert masks(one_block_sd_folder, concepts) == 3
    assert "2.png: cannot be decoded" in capsys.readouterr().err
    assert not (concepts / "cup" / "0.mask.png").exists()
    assert (concepts / "dog" / "alpha.mask.png").exists()


def test_messages(
    concepts: Path, one_block_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*more: object) -> str:
        assert masks(one_block_sd_folder, concepts, *more) in (2, 3)
        return capsys.readouterr().err

    assert "noise_levels=(2.0,): must be numbers from 0 to below 1" in error("--noise_levels", 2)
    assert "--threshold: is an option of --clipseg" in error("--threshold", 0.5)
    (concepts / "cup" / "1-masklabel.png").unlink()
    Image.fromarray(noise(0, SIDE, SIDE)).save(concepts / "cup" / "1.mask.bmp")
    assert "masks are written as PNG only. Remove this mask" in error("--overwrite")
    blocked = concepts.parent / "file"
    blocked.write_text("x")
    assert "cannot be written" in error("--output_dir", blocked / "sheets")


def test_rows_of_a_dataset_have_no_place_for_masks() -> None:
    spec = ConceptSpec("cups", "cup", (ImageSource("row 0", data=b"..."),))
    with pytest.raises(ConceptError, match=r"cups: its images are rows of a dataset.*Save them"):
        mask_paths(spec)


def _read_masks(source: Path, **options: object) -> dict[str, np.ndarray]:
    """By image what is object in its mask, as training reads it."""
    read = read_concepts(source, **options).concepts
    images = [(spec.name, image) for spec in read for image in spec.images]
    return {
        f"{name}/{image.label}": np.asarray(decode_upright(image).mask) >= 128
        for name, image in images
    }


def test_masks_are_made_in_the_colour_of_those_that_were_given(
    concepts: Path, one_block_sd_folder: Path
) -> None:
    masks(one_block_sd_folder, concepts, "--overwrite")
    white = _read_masks(concepts)
    for path in concepts.rglob("*mask*.png"):
        path.unlink()
    masks(one_block_sd_folder, concepts, "--overwrite", "--mask_polarity", "black")
    black = _read_masks(concepts, mask_polarity="black")
    assert black.keys() == white.keys()
    for name, mask in black.items():
        np.testing.assert_array_equal(mask, white[name], name)


def test_a_mask_that_two_photos_share_is_replaced_by_two(
    concepts: Path, one_block_sd_folder: Path
) -> None:
    dog = concepts / "dog"
    Image.fromarray(np.eye(24, 40, dtype=np.uint8) * 255).save(dog / "photo.mask.png")
    Image.fromarray(noise(9, 24, 40, 3)).save(dog / "photo.png")
    (_, spec) = read_concepts(concepts).concepts
    assert "photo.jpg and photo.png have one mask: photo.mask.png" in spec.warnings
    assert masks(one_block_sd_folder, concepts, "--overwrite") == 0
    (_, spec) = read_concepts(concepts).concepts
    names = [image.mask.name for image in spec.images if image.mask is not None]
    assert names == ["alpha.mask.png", "photo.jpg.mask.png", "photo.png.mask.png"]


def test_one_photo_of_two_things_has_one_mask(
    concepts: Path, one_block_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [
        {"name": word, "base_class": word, "images": ["cup/0.png"]} for word in ("cup", "table")
    ]
    (concepts / "both.json").write_text(json.dumps([*listed, {**listed[0], "name": "again"}]))
    assert masks(one_block_sd_folder, concepts / "both.json") == 3
    said = capsys.readouterr().err
    assert "table: left out" in said
    assert "is the mask of 'cup' in that photo, for concept cup" in said
    assert "again" not in said


def test_contact_sheets_are_no_photos(
    concepts: Path, one_block_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (concepts / "list.json").write_text(
        json.dumps([{"path": "cup", "base_class": "cup", "name": "cup"}])
    )
    before = sorted(concepts.rglob("*"))
    for source, output in ((concepts, concepts / "cup"), (concepts, concepts / "new")):
        assert masks(one_block_sd_folder, source, "--output_dir", output) == 2
    assert masks(one_block_sd_folder, concepts / "list.json", "--output_dir", concepts / "cup") == 2
    assert "would be taken for photos" in capsys.readouterr().err
    assert sorted(concepts.rglob("*")) == before
