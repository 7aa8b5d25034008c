"""Photos that are kept from training: in every layout, by ``eval_images`` and by ``holdout``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from concept_folders import labels, put_images
from PIL import Image

from catversion_jax.cli import main
from catversion_jax.concepts import ConceptSpec, read_concepts
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.subjects import read_run
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.training.run.identity import image_digests

FIVE = tuple(f"{i}.png" for i in range(1, 6))


def held_out(spec: ConceptSpec) -> list[str]:
    return [image.label for image in spec.eval_images]


def only(found) -> ConceptSpec:
    assert not found.problems
    (spec,) = found.concepts
    return spec


def test_the_last_photos_in_natural_order(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", "1.png", "2.png", "10.png", "9.png", "cover.png")
    spec = only(read_concepts(tmp_path / "cup", base_class="cup", holdout=2))
    assert (labels(spec), held_out(spec)) == (["1.png", "2.png", "9.png"], ["10.png", "cover.png"])
    assert "held out from training, for evaluation: 10.png, cover.png" in spec.notes
    plain = only(read_concepts(tmp_path / "cup", base_class="cup"))
    assert (len(plain.images), plain.eval_images, plain.notes) == (5, (), ())


def test_too_few_photos_stay_in_training(tmp_path: Path) -> None:
    for name, count in (("few", 3), ("enough", 4)):
        put_images(tmp_path / name, *FIVE[:count])
    few, enough = sorted(
        read_concepts(tmp_path, base_class="cup", holdout=1).concepts, key=lambda s: len(s.images)
    )
    assert {few.name, enough.name} == {"few", "enough"}
    by_name = {spec.name: spec for spec in (few, enough)}
    assert len(by_name["few"].images) == 3
    assert by_name["few"].eval_images == ()
    assert any("holdout=1: all 3 images stay" in note for note in by_name["few"].notes)
    assert held_out(by_name["enough"]) == ["4.png"]


def listed_in_concept_file(folder: Path) -> Path:
    put_images(folder / "cup", *FIVE)
    text = json.dumps({"base_class": "cup", "eval_images": ["2.png", "./5.png"]})
    (folder / "cup" / "concept.json").write_text(text)
    return folder / "cup"


def listed_in_a_table(folder: Path) -> Path:
    put_images(folder / "cup", *FIVE)
    rows = "name,path,base_class,eval_images\ncup,cup,cup,cup/2.png|cup/5.png\n"
    (folder / "list.csv").write_text(rows)
    return folder / "list.csv"


def listed_beside_images(folder: Path) -> Path:
    put_images(folder / "cup", *FIVE)
    files = [f"cup/{name}" for name in FIVE]
    entry = {"name": "cup", "base_class": "cup", "images": files}
    entry["eval_images"] = ["cup/2.png", "cup/5.png"]
    (folder / "list.json").write_text(json.dumps([entry]))
    return folder / "list.json"


def in_a_folder_of_the_habit(folder: Path) -> Path:
    put_images(folder / "cup", "1.png", "3.png", "4.png")
    put_images(folder / "cup" / "eval_images", "2.png", "5.png")
    (folder / "cup" / "concept.json").write_text('{"base_class": "cup"}')
    return folder


def in_a_named_folder(folder: Path) -> Path:
    put_images(folder / "cup", "1.png", "3.png", "4.png")
    put_images(folder / "cup" / "test", "2.png", "5.png")
    text = json.dumps({"base_class": "cup", "eval_images": "test"})
    (folder / "cup" / "concept.json").write_text(text)
    return folder


def in_kohyas_project(folder: Path) -> Path:
    put_images(folder / "img" / "10_cup", "1.png", "3.png", "4.png")
    put_images(folder / "img" / "10_cup" / "eval_images", "2.png", "5.png")
    (folder / "img" / "10_cup" / "concept.json").write_text('{"base_class": "cup"}')
    return folder


def in_onetrainers_list(folder: Path) -> Path:
    """Which walks into sub-folders."""
    put_images(folder / "cup", "1.png")
    put_images(folder / "cup" / "more", "3.png", "4.png")
    put_images(folder / "cup" / "eval_images", "2.png", "5.png")
    entry = {"name": "cup", "path": str(folder / "cup"), "include_subdirectories": True}
    (folder / "concepts.json").write_text(json.dumps([entry]))
    return folder / "concepts.json"


@pytest.mark.parametrize(
    "write",
    [
        listed_in_concept_file,
        listed_in_a_table,
        listed_beside_images,
        in_a_folder_of_the_habit,
        in_a_named_folder,
        in_kohyas_project,
        in_onetrainers_list,
    ],
)
def test_every_layout(write, tmp_path: Path) -> None:
    spec = only(read_concepts(write(tmp_path), base_class="cup"))
    names = [source.path.name for source in spec.images]
    assert names == ["1.png", "3.png", "4.png"]
    assert [source.path.name for source in spec.eval_images] == ["2.png", "5.png"]
    assert spec.skipped == ()
    again = only(read_concepts(write(tmp_path), base_class="cup", holdout=1))
    assert again.images == spec.images  # its own choice wins


def test_masks_and_polarity_come_along(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", *FIVE, "5.mask.png")
    put_images(tmp_path / "cup" / "eval_images", "x.png", "x.mask.png")
    spec = only(read_concepts(tmp_path / "cup", base_class="cup", mask_polarity="black"))
    (source,) = spec.eval_images
    assert (source.label, source.mask_polarity) == ("eval_images/x.png", "black")
    assert source.mask is not None
    assert source.mask.name == "x.mask.png"
    shutil.rmtree(tmp_path / "cup" / "eval_images")
    (last,) = only(read_concepts(tmp_path / "cup", base_class="cup", holdout=1)).eval_images
    assert last.mask is not None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["6.png"], r"eval_images not found: .*6\.png.*relative to"),
        ("6.png", r"eval_images not found: .*6\.png"),
        (7, r"eval_images=7: must be a list of file names"),
        (list(FIVE), r"names all 5 images, so none is left to train on"),
        (".", r"is the folder of the training images itself"),
        ("empty", r"no image in .*empty"),
    ],
)
def test_what_cannot_be_held_out(value, message: str, tmp_path: Path) -> None:
    put_images(tmp_path / "cup", *FIVE)
    (tmp_path / "cup" / "empty").mkdir()
    text = json.dumps({"base_class": "cup", "eval_images": value})
    (tmp_path / "cup" / "concept.json").write_text(text)
    with pytest.raises(CatVersionError, match=message):
        read_concepts(tmp_path / "cup")


@pytest.mark.parametrize("holdout", [-1, 1.5, "1", True])
def test_holdout_is_a_number(holdout, tmp_path: Path) -> None:
    put_images(tmp_path / "cup", *FIVE)
    with pytest.raises(CatVersionError, match=r"holdout=.*must be a number of photos"):
        read_concepts(tmp_path / "cup", base_class="cup", holdout=holdout)


def test_check_says_it_and_finds_a_photo_on_both_sides(tmp_path: Path, capsys) -> None:
    put_images(tmp_path / "cup", *FIVE)
    for number, name in enumerate(FIVE):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "cup" / name)
    shutil.copy(tmp_path / "cup" / "1.png", tmp_path / "cup" / "5.png")
    arguments = ["check", str(tmp_path / "cup"), "--base_class", "cup", "--resolution", "64"]
    assert main([*arguments, "--holdout", "1"]) == 0
    shown = capsys.readouterr().out
    assert "held out from training, for evaluation: 5.png" in shown
    assert "1.png and 5.png are the same picture" in shown
    assert main([*arguments, "--holdout", "-1"]) == 2


def test_a_photo_that_was_trained_on_is_not_held_out(tmp_path: Path, caplog) -> None:
    """By content where the file knows it, by name in files of version 0.1."""
    photos = put_images(tmp_path / "cup", *FIVE)
    for number, name in enumerate(FIVE):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(photos / name)
    spec = only(read_concepts(photos, base_class="cup", holdout=1))
    trained = image_digests(spec, masked=False)
    file = tmp_path / "run" / "concepts" / "cup" / "catversion.safetensors"
    numbers = np.zeros((3, 1, 4, 16), np.float32)
    residual = KVResidual(numbers, numbers, (3, 4, 5))

    def held(digests: dict[str, object], holdout: int) -> list[str]:
        names = [source.label for source in spec.images]
        config = {"digests": digests} if digests else {}
        save_concept(file, residual, base_class="cup", name="cup", images=names, config=config)
        found = read_concepts(photos, base_class="cup", holdout=holdout)
        (subject,), left_out = read_run(tmp_path / "run", found)
        assert not left_out
        return [source.label for source in subject.held_out]

    assert held(trained, 1) == ["5.png"]
    assert not caplog.messages
    assert held(trained, 2) == ["5.png"]
    assert "4.png was trained on, so it does not count as held out" in caplog.text
    (photos / "4.png").rename(photos / "4b.png")
    assert held(trained, 2) == ["5.png"]
    assert held({}, 2) == ["4b.png", "5.png"]
    shutil.copy(photos / "1.png", photos / "5.png")
    assert held(trained, 1) == []
