"""What ``catversion evaluate`` refuses or leaves out, and what it says of it."""

import re
import shutil

import numpy as np
import pytest
from evaluating import evaluate, evaluate_fully, scores_of, write_world
from PIL import Image
from random_model import write_toy_concepts

from catversion_jax.cli import main
from catversion_jax.concepts import read_concepts
from catversion_jax.config import TrainConfig, dump_config
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.subjects import read_run, subjects_of_images
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.training.run.identity import image_digest
from catversion_jax.training.run.reader import recorded_concepts


@pytest.fixture(scope="module")
def world(made_once):
    return made_once("evaluation-world", write_world)


@pytest.fixture(scope="module")
def output(made_once, world):
    """Everything the command can do, once."""
    return made_once("evaluated", lambda folder: evaluate_fully(world, folder))


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere", [], r"nowhere: is no folder"),
        ("concepts", [], r"holds no trained concept.*--concepts"),
        ("run", ["--prompts", "dreambnech"], r"dreambnech: is no shipped set"),
        ("run", ["--num_images_per_prompt", "0"], r"num_images_per_prompt=0: must be at least 1"),
        ("run", ["--num_prior_images", "-1"], r"num_prior_images=-1"),
        ("run", ["--clip", "model/text_encoder"], r"clip_text_model"),
        ("run", ["--dino", "clip"], r"is a 'clip', the DINO score needs a ViTModel folder"),
        ("run", ["--batch_size", "0"], r"batch_size=0"),
        ("run", ["--gate_rank1", "0.9"], r"--gate_rank1: says what fails the gate.*Give --gate"),
        ("run", ["--base_class", "dog"], r"base_class='dog': is for concepts that --concepts"),
        ("model", ["--concepts", "concepts"], r"neither a run .*<concept>/<prompt>_<seed>.png"),
    ],
)
def test_wrong_input_says_what_to_do(world, tmp_path, capsys, source, more, message):
    given = [str(world / word) if (world / word).exists() else word for word in more]
    assert evaluate(world, world / source, tmp_path / "out", *given) == 2
    assert re.search(message, capsys.readouterr().err)


def test_prompts_that_would_get_one_file(world, tmp_path, capsys):
    (tmp_path / "same.txt").write_text("a red {}\na red, {}\n")
    assert evaluate(world, world / "run", tmp_path / "o", "--prompts", tmp_path / "same.txt") == 2
    said = capsys.readouterr().err
    assert "would get this file: 'a red ball' and 'a red, ball'" in said


@pytest.mark.parametrize("more", [["--plain"], ["--all_steps"], ["--scales", "0.5"]])
def test_images_from_elsewhere_are_not_drawn(world, output, tmp_path, capsys, more):
    images = ["--concepts", world / "concepts", *more]
    assert evaluate(world, output / "images", tmp_path / "out", *images) == 2
    assert "is a folder of images; plain, all_steps and scales draw" in capsys.readouterr().err


def test_a_moved_run_asks_for_concepts_and_model(world, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(world / "run", moved)
    config = TrainConfig(concepts="gone/photos")
    (moved / "config.resolved.yaml").write_text(dump_config(config))
    assert evaluate(world, moved, tmp_path / "out") == 2
    assert re.search(r"names 'gone/photos'.*--concepts", capsys.readouterr().err)
    (moved / "run.json").unlink()
    assert evaluate(world, moved, tmp_path / "out", "--concepts", world / "concepts") == 2
    assert re.search(r"which model it was trained on.*--model", capsys.readouterr().err)


def test_a_quarantined_concept_is_named(world, output, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    (run / "concepts" / "broken").mkdir()
    (run / "concepts" / "broken" / "FAILED.txt").write_text("an image cannot be read")
    shutil.copytree(output, tmp_path / "out")
    assert evaluate(world, run, tmp_path / "out") == 3
    assert "broken: left out, its training failed" in capsys.readouterr().err


def test_one_damaged_concept_leaves_the_others_their_scores(world, output, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    shutil.copytree(run / "concepts" / "teal_cup", run / "concepts" / "unknown")
    (run / "concepts" / "unknown" / "catversion.safetensors").write_bytes(b"nothing")
    shutil.copytree(output, tmp_path / "out")
    shutil.copytree(world / "concepts", tmp_path / "photos")
    (tmp_path / "photos" / "striped_ball" / "2.png").write_bytes(b"no image")
    code = evaluate(world, run, tmp_path / "out", "--concepts", tmp_path / "photos")
    assert code == 3
    shown = capsys.readouterr().err
    assert re.search(r"unknown: left out: .*unknown.catversion.safetensors", shown)
    assert re.search(r"striped_ball: left out: .*2.png", shown)
    found = scores_of(tmp_path / "out")
    assert list(found["left_out"]) == ["unknown", "striped_ball"]
    before = scores_of(output)["methods"]["CatVersion"]["concepts"][1]
    (cup,) = found["methods"]["CatVersion"]["concepts"]
    for key in ("name", "image_alignment_masked", "text_alignment_edit", "overall", "copies"):
        assert cup[key] == before[key]

    shutil.rmtree(tmp_path / "photos" / "striped_ball")
    assert evaluate(world, run, tmp_path / "out", "--concepts", tmp_path / "photos") == 3
    assert re.search(r"no training images of striped_ball.*--concepts", capsys.readouterr().err)

    assert main(["export", str(run), "--output_dir", str(tmp_path / "files")]) == 3
    assert "unknown: left out: " in capsys.readouterr().err
    assert len([*(tmp_path / "files").rglob("*.safetensors")]) == 2


def test_images_whose_concept_cannot_be_read_are_named(tmp_path, caplog):
    write_toy_concepts(tmp_path / "concepts")
    (tmp_path / "concepts" / "teal_cup" / "concept.json").write_text("{")
    for name in ("striped_ball", "teal_cup", "stranger"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0_0.png")
    concepts = read_concepts(str(tmp_path / "concepts"))
    subjects, left_out = subjects_of_images(tmp_path / "images", concepts)
    assert [subject.name for subject in subjects] == ["striped_ball"]
    assert list(left_out) == ["teal_cup"]
    assert re.search(r"concept.json: .*JSON", left_out["teal_cup"])
    assert re.search(r"not scored, .*: 'stranger'", caplog.text)
    shutil.rmtree(tmp_path / "images" / "striped_ball")
    with pytest.raises(CatVersionError, match=r"concept\.json"):
        subjects_of_images(tmp_path / "images", concepts)


def test_two_images_of_one_prompt_and_seed(world, output, tmp_path, capsys):
    folder = tmp_path / "images" / "teal_cup"
    shutil.copytree(output / "images" / "teal_cup", folder)
    shutil.copy(next(folder.glob("*snow_0.png")), folder / "0_0.png")
    code = evaluate(world, tmp_path / "images", tmp_path / "o", "--concepts", world / "concepts")
    assert code == 2
    assert re.search(r"in the snow' with seed 0, and so does", capsys.readouterr().err)


def test_no_image_of_the_prompts(world, tmp_path, capsys):
    folder = tmp_path / "images" / "teal_cup"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "sunset_0.png")
    code = evaluate(world, tmp_path / "images", tmp_path / "o", "--concepts", world / "concepts")
    assert code == 2
    assert re.search(r"'a-cup-in-the-snow_0.png' or '0_0.png'.*sunset", capsys.readouterr().err)


def test_a_mask_of_another_size(world, output, tmp_path, capsys):
    folder = tmp_path / "images" / "teal_cup"
    shutil.copytree(output / "images" / "teal_cup", folder)
    image = next(folder.glob("*snow_0.png"))
    Image.new("L", (32, 64)).save(image.with_suffix(".mask.png"))
    code = evaluate(world, tmp_path / "images", tmp_path / "o", "--concepts", world / "concepts")
    assert code == 2
    assert "is 32 x 64 but its image 64 x 64" in capsys.readouterr().err


def test_photos_that_were_not_trained_on_are_named(tmp_path, caplog):
    write_toy_concepts(tmp_path / "photos")
    concepts = read_concepts(str(tmp_path / "photos"))
    (cup,) = (spec for spec in concepts.concepts if spec.name == "teal_cup")
    digests = {"images": [image_digest(source) for source in cup.images]}
    arrays = np.zeros((2, 1, 1, 1, 4), np.float32)
    file = tmp_path / "run" / "concepts" / "teal_cup" / "catversion.safetensors"
    learned = KVResidual(*arrays, (0,))
    Concept(learned, "cup", "teal_cup", train_config={"digests": digests}).save(file)
    read_run(tmp_path / "run", concepts)
    assert not caplog.text
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "teal_cup" / "1.png")
    read_run(tmp_path / "run", read_concepts(str(tmp_path / "photos")))
    assert "teal_cup: 1 of the 4 photos" in caplog.text
    assert "not among those it was trained on (1.png)" in caplog.text


def test_photos_elsewhere_are_read_as_the_run_read_them(tmp_path):
    """What is black in its masks, and how many were held out; what is given wins."""
    write_toy_concepts(tmp_path / "photos")
    (tmp_path / "run").mkdir()
    config = TrainConfig(concepts="gone", mask_polarity="black", max_megapixels=7.0, holdout=1)
    (tmp_path / "run" / "config.resolved.yaml").write_text(dump_config(config))
    source = str(tmp_path / "photos")
    for holdout, expected in ((None, 1), (0, 0)):
        found = recorded_concepts(tmp_path / "run", holdout, source=source)
        for spec in found.concepts:
            assert {image.mask_polarity for image in spec.images} == {"black"}
            assert {image.max_megapixels for image in spec.images} == {7.0}
            assert len(spec.eval_images) == expected
    (tmp_path / "run" / "config.resolved.yaml").write_text("{")
    assert len(recorded_concepts(tmp_path / "run", source=source).concepts) == 3
