"""``catversion evaluate`` end to end on a random model, scored again with torch."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import transformers
from evaluating import (
    NAMES,
    PROMPTS,
    TorchClip,
    dino_vectors,
    evaluate,
    evaluate_fully,
    pictures_of,
    scores_of,
    write_world,
)
from PIL import Image
from torch_reference import randomise

from catversion_jax import load_concept, save_concept
from catversion_jax.cli import main
from catversion_jax.concepts import ImageSource
from catversion_jax.evaluation import load_prompt_set
from catversion_jax.evaluation.masked_crops import masked_crop
from catversion_jax.evaluation.scoring import Scorer
from catversion_jax.evaluation.subjects import Subject, read_references
from catversion_jax.models.embedders import CLIP_MEAN, ClipEmbedder
from catversion_jax.sampling.png import read_metadata

WITHOUT_MASKS = shutil.ignore_patterns("*.mask.png")


@pytest.fixture(scope="module")
def world(made_once):
    return made_once("evaluation-world", write_world)


@pytest.fixture(scope="module")
def output(made_once, world):
    """Everything the command can do, once."""
    return made_once("evaluated", lambda folder: evaluate_fully(world, folder))


def test_scores_equal_transformers(world, output):
    clip = TorchClip(world / "clip")
    concepts = scores_of(output)["methods"]["CatVersion"]["concepts"]
    assert [c["name"] for c in concepts] == list(NAMES)
    for concept in concepts:
        word = concept["base_class"]
        photos = [
            np.asarray(Image.open(world / "concepts" / concept["name"] / f"{i}.png"))
            for i in range(1, 5)
        ]
        real = clip.images(photos)
        snow, wet = (
            clip.images(pictures_of(output / "images" / concept["name"], key))
            for key in ("snow", "wet")
        )
        generated = np.concatenate([snow, wet])
        edits = clip.texts(["in the snow", "wet & <script>document.title = 'owned'</script>"])
        prompts = clip.texts([prompt.format(word) for prompt in PROMPTS])
        text = np.mean([snow @ edits[0], wet @ edits[1]])
        image = (generated @ real.T).mean()
        among = (real @ real.T)[np.triu_indices(4, 1)]
        assert concept["images"] == 4
        assert concept["image_alignment"] == pytest.approx(image, abs=1e-5)
        assert concept["text_alignment_edit"] == pytest.approx(text, abs=1e-5)
        full = np.mean([snow @ prompts[0], wet @ prompts[1]])
        assert concept["text_alignment_prompt"] == pytest.approx(full, abs=1e-5)
        expected = np.sqrt(max(image, 0) * max(text, 0))
        assert concept["overall"] == pytest.approx(expected, abs=1e-4)
        nearest = (generated @ real.T).max(axis=1)
        assert concept["nearest_reference"] == pytest.approx(nearest.max(), abs=1e-5)
        assert concept["copies"] == (nearest > among.max()).sum()
        assert concept["training_images"]["image_alignment"] == pytest.approx(
            among.mean(), abs=1e-5
        )
        assert concept["masks"] == 4  # made from the model's attention, kept beside the images
        assert concept["dino"] is not None


def test_masked_scores_and_empty_masks(world, output, tmp_path):
    """Half the generated images get a disc as mask, one an empty mask; the rest have none."""
    images = tmp_path / "images"
    shutil.copytree(output / "images", images, ignore=WITHOUT_MASKS)
    y, x = np.mgrid[:64, :64]
    disc = np.uint8(255) * ((y - 30) ** 2 + (x - 34) ** 2 < 20**2)
    for name in NAMES:
        snow = sorted((images / name).glob("*snow_?.png"))
        Image.fromarray(disc).save(snow[0].with_suffix(".mask.png"))
        Image.fromarray(0 * disc).save(snow[1].with_suffix(".mask.png"))
    concepts = ["--concepts", world / "concepts"]
    assert evaluate(world, images, tmp_path / "out", *concepts) == 0
    clip, fill = TorchClip(world / "clip"), np.array(CLIP_MEAN)
    for concept in scores_of(tmp_path / "out")["methods"]["images"]["concepts"]:
        folder = world / "concepts" / concept["name"]
        crops = [
            masked_crop(
                np.asarray(Image.open(folder / f"{i}.png")),
                np.asarray(Image.open(folder / f"{i}.mask.png").convert("L")),
                fill,
            )
            for i in range(1, 5)
        ]
        first = pictures_of(output / "images" / concept["name"], "snow")[0]
        one, real = clip.images([masked_crop(first, disc, fill)]), clip.images(crops)
        assert (concept["masks"], concept["empty_masks"]) == (2, 1)
        expected = (one @ real.T).mean()
        assert concept["image_alignment_masked"] == pytest.approx(expected, abs=1e-5)
        overall = np.sqrt(max(expected, 0) * max(concept["text_alignment_edit"], 0))
        assert concept["overall_masked"] == pytest.approx(overall, abs=1e-5)


def test_held_out_photos_take_the_place_of_training_photos(world, output, tmp_path):
    """The last photo is compared with; copies are still counted against the first three."""
    concepts = ["--concepts", world / "concepts", "--holdout", "1"]
    assert evaluate(world, output / "images", tmp_path, *concepts, "--dino", world / "dino") == 0
    clip, found = TorchClip(world / "clip"), scores_of(tmp_path)
    assert found["protocol"]["photos"].startswith("held out from training for 2 concepts;")
    for concept in found["methods"]["images"]["concepts"]:
        folder = world / "concepts" / concept["name"]
        photos = clip.images([np.asarray(Image.open(folder / f"{i}.png")) for i in range(1, 5)])
        trained, held_out = photos[:3], photos[3:]
        images = output / "images" / concept["name"]
        drawn = clip.images(pictures_of(images, "snow") + pictures_of(images, "wet"))
        assert concept["held_out_images"] == ["4.png"]
        assert concept["image_alignment"] == pytest.approx((drawn @ held_out.T).mean(), abs=1e-5)
        real = concept["training_images"]["image_alignment"]
        assert real == pytest.approx((trained @ held_out.T).mean(), abs=1e-5)
        limit = (trained @ trained.T)[np.triu_indices(3, 1)].max()
        assert concept["copies"] == ((drawn @ trained.T).max(axis=1) > limit).sum()
    page = (tmp_path / "report.html").read_text()
    assert page.count("Photos held out from training, which the scores are against") == 2
    assert "held-out photo" not in (output / "report.html").read_text()


def test_gallery_and_dinov2_equal_transformers(world, output, tmp_path):
    """Both toys as one class, their pictures under numbers; whole pictures, as none has a mask."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)
    model = randomise(transformers.Dinov2Model(config)).eval()
    model.save_pretrained(tmp_path / "dinov2")
    entries, vectors = [], {}
    for name in NAMES:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        drawn = pictures_of(output / "images" / name, "snow")
        for seed, picture in enumerate(drawn):
            Image.fromarray(picture).save(folder / f"0_{seed}.png")
        photos = [Image.open(world / "concepts" / name / f"{i}.png") for i in range(1, 5)]
        vectors[name] = [dino_vectors(model, part) for part in (drawn, map(np.asarray, photos))]
        path = str(world / "concepts" / name)  # whose concept.json calls it something else
        entries.append({"name": name, "path": path, "base_class": "toy"})
    (tmp_path / "list.json").write_text(json.dumps(entries))
    given = ["--concepts", tmp_path / "list.json"]
    more = ["--gallery", "--dino", tmp_path / "dinov2"]
    assert evaluate(world, tmp_path / "images", tmp_path / "out", *given, *more) == 0
    found = scores_of(tmp_path / "out")
    for concept in found["methods"]["images"]["concepts"]:
        drawn, photos = vectors[concept["name"]]
        (other,) = (photos for name, (_, photos) in vectors.items() if name != concept["name"])
        assert concept["dino"] == pytest.approx((drawn @ photos.T).mean(), abs=1e-4)
        assert concept["dino_max"] == pytest.approx((drawn @ photos.T).max(axis=1).mean(), abs=1e-4)
        nearer = (drawn @ photos.T).max(axis=1) > (drawn @ other.T).max(axis=1)
        assert concept["rank1"] == pytest.approx(nearer.mean())
        assert "dino_masked" not in concept
    (gallery,) = found["galleries"]["images"]
    assert (gallery["base_class"], gallery["judge"], gallery["photos"]) == ("toy", "DINOv2", 8)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Can it be told from others of its class?" in page
    assert "Can it be told from others" not in (output / "report.html").read_text()


def test_gate_scales_and_dreambench_plus(world, output, tmp_path, capsys):
    """What the options write, from the scores themselves."""
    shutil.copytree(output, tmp_path / "out")
    layout = ["--dreambench_plus", tmp_path / "plus"]
    more = ["--gate", "--gate_copies", "0", "--scales", "0.5,1", *layout]
    code = evaluate(world, world / "run", tmp_path / "out", *more)
    shown = capsys.readouterr().out
    assert int(re.search(r"(\d+) images, (\d+) of them", shown)[1]) > 0
    found, gate = scores_of(tmp_path / "out"), json.loads((tmp_path / "out/gate.json").read_text())
    concepts = {one["name"]: one for one in found["methods"]["CatVersion"]["concepts"]}
    plain = {one["name"]: one for one in found["methods"]["plain model"]["concepts"]}
    failing = {
        name
        for name, one in concepts.items()
        if one["copies"] > 0
        or plain[name]["text_alignment_edit"] - one["text_alignment_edit"] > 0.05
    }
    assert set(gate["failed"]) == failing
    assert code == (4 if failing else 0)
    assert all(value["updates"] == 20 for value in gate["failed"].values())
    assert gate["not_checked"] == {"rank1": list(NAMES)}  # each is alone in its class
    assert found["gate"] == gate
    assert [point["scale"] for point in found["frontier"]] == [0, 0.5, 1]
    half = read_metadata(next((tmp_path / "out/scales/0.5/teal_cup").glob("*_0.png")))
    assert half["concepts"][0]["scale"] == 0.5
    of_cup = [point["concepts"]["teal_cup"] for point in found["frontier"]]
    assert of_cup[0]["images"] == of_cup[1]["images"] == of_cup[2]["images"] == 2
    assert len([*(tmp_path / "plus").glob("tgt_image/*/*.jpg")]) == 8
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Quality gate", "How strong should it be?", "No gallery, as only one concept"):
        assert words in page
        assert words not in (output / "report.html").read_text()
    assert evaluate(world, world / "run", tmp_path / "o", "--gate", "--gate_rank1", "2") == 2
    assert evaluate(world, world / "run", tmp_path / "o", "--scales", "half") == 2


@pytest.mark.slow
def test_the_same_command_gives_the_same_digits(world, output, tmp_path):
    evaluate_fully(world, tmp_path)
    for name in ("scores.csv", "scores.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_generated_images_score_the_same_as_a_run(world, output, tmp_path):
    concepts = ["--concepts", world / "concepts", "--dino", world / "dino"]
    assert evaluate(world, output / "images", tmp_path, *concepts) == 0
    again, before = scores_of(tmp_path), scores_of(output)
    assert again["methods"]["images"] == before["methods"]["CatVersion"]
    assert again["prior_preservation"] == before["prior_preservation"]
    drawn_with = again["protocol"]["drawn with"]
    assert (drawn_with["model"], drawn_with["num_inference_steps"]) == (str(world / "model"), 2)
    assert again["protocol"]["seeds"] == before["protocol"]["seeds"] == [0, 1]


def test_foreign_names_give_the_same_scores(world, output, tmp_path):
    """Numbers and slugs instead of our metadata."""
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, key in enumerate(("snow", "wet")):
            for seed, picture in enumerate(pictures_of(output / "images" / name, key)):
                word = NAMES[name]
                stem = f"0{number}" if key == "wet" else f"a-{word}-in-the-snow"
                Image.fromarray(picture).save(tmp_path / "images" / name / f"{stem}_{seed}.png")
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / name / "sunset_3.png")
    concepts = ["--concepts", world / "concepts"]
    assert evaluate(world, tmp_path / "images", tmp_path / "out", *concepts) == 0
    ours = scores_of(output)["methods"]["CatVersion"]["concepts"]
    for before, after in zip(
        ours, scores_of(tmp_path / "out")["methods"]["images"]["concepts"], strict=True
    ):
        assert after["image_alignment"] == before["image_alignment"]
        assert after["text_alignment_edit"] == before["text_alignment_edit"]
        assert after["ignored_files"] == ["sunset_3.png"]
    assert scores_of(tmp_path / "out")["protocol"]["drawn with"] == "the files do not say"


def test_an_interrupted_evaluation_continues(world, output, tmp_path, capsys):
    shutil.copytree(output, tmp_path / "out")
    lost = next((tmp_path / "out" / "images" / "teal_cup").glob("*snow_?.png"))
    bits = lost.read_bytes()
    lost.unlink()
    evaluate_fully(world, tmp_path / "out")
    total, kept = map(
        int, re.search(r"(\d+) images, (\d+) of them", capsys.readouterr().out).groups()
    )
    assert total - kept == 1
    assert lost.read_bytes() == bits


def test_what_an_earlier_evaluation_drew_is_not_scored(world, output, tmp_path):
    """Fewer images, another seed, no plain model: as in a folder where nothing was drawn before."""
    shutil.copytree(output, tmp_path / "again")
    for seed in ("0", "1"):
        fewer = ["--num_images_per_prompt", "1", "--num_prior_images", "0", "--seed", seed]
        for folder in ("again", seed):
            assert evaluate(world, world / "run", tmp_path / folder, *fewer) == 0
        again, fresh = scores_of(tmp_path / "again"), scores_of(tmp_path / seed)
        assert again["protocol"] == fresh["protocol"]
        assert again["protocol"]["seeds"] == [int(seed)]
        assert again["prior_preservation"] == fresh["prior_preservation"] == {}
        pairs = zip(
            *(one["methods"]["CatVersion"]["concepts"] for one in (again, fresh)), strict=True
        )
        for one, other in pairs:
            assert one.pop("ignored_files")
            assert other.pop("ignored_files") == []
            assert one == other


def test_class_words_of_any_script_and_in_capitals(world, tmp_path):
    """Each has files of its own; "Cup" and "cup" are one class."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    words = {"striped_ball": "犬", "teal_cup": "猫"}
    for name, word in words.items():
        file = run / "concepts" / name / "catversion.safetensors"
        save_concept(
            file, load_concept(file).learned, base_class=word, name=name, when="always", step=20
        )
    classes = ["--classes", "cup,Cup", "--num_images_per_prompt", "1"]
    assert evaluate(world, run, tmp_path / "out", *classes) == 0
    found = scores_of(tmp_path / "out")
    assert found["protocol"]["classes for zero-shot"] == ["cup", "犬", "猫"]
    for name in words:
        prior = found["prior_preservation"][name]
        assert prior["off_identical"]
        assert prior["images"] == 2
    plain = {path.name.partition("--")[0] for path in (tmp_path / "out/images/_plain").iterdir()}
    assert plain == {"cup", "犬", "猫"}


def test_what_generate_writes_is_recognised(world, tmp_path):
    """One --output_dir per concept; prompt and seed come from the PNG, the grid is left out."""
    prompts = [word for text in PROMPTS for word in ("--prompt", text.format("cup"))]
    command = ["generate", "--model", str(world / "model"), "--num_inference_steps", "2"]
    out = tmp_path / "images" / "teal_cup"
    assert main([*command, *prompts, "--seed", "7", "--output_dir", str(out)]) == 0
    concepts = ["--concepts", world / "concepts"]
    assert evaluate(world, tmp_path / "images", tmp_path / "out", *concepts) == 0
    (cup,) = scores_of(tmp_path / "out")["methods"]["images"]["concepts"]
    assert [row["prompt"] for row in cup["prompts"]] == [text.format("cup") for text in PROMPTS]
    assert (cup["images"], cup["ignored_files"]) == (2, [])


def test_a_masker_fills_in_what_is_missing(world, output, tmp_path):
    """Mask files win; made masks are kept beside the images and serve the next time."""
    images = tmp_path / "images"
    shutil.copytree(output / "images" / "teal_cup", images / "teal_cup", ignore=WITHOUT_MASKS)
    snow = sorted((images / "teal_cup").glob("*snow_?.png"))
    given = np.zeros((64, 64), np.uint8)
    given[:32] = 255
    Image.fromarray(given).save(snow[0].with_suffix(".mask.png"))
    asked = []

    def left_half(pixels, base_classes):
        asked.extend(base_classes)
        masks = np.zeros(pixels.shape[:3], np.uint8)
        masks[:, :, :32] = 255
        return masks

    photo = ImageSource("1.png", world / "concepts" / "teal_cup" / "1.png")
    subject = Subject("teal_cup", "cup", (photo,))
    references = read_references(subject, left_half, 64)
    assert asked == ["cup"]
    prompts = load_prompt_set(str(world / "prompts.txt"))
    scorer = Scorer(ClipEmbedder(world / "clip"), prompts, masker=left_half)
    total = scorer.score(subject, references, images).total
    assert asked == ["cup"] * 4  # one photo, three of four images
    assert (total.images, total.masks, total.empty_masks) == (4, 4, 0)
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    for path in snow[1:]:
        np.testing.assert_array_equal(Image.open(path.with_suffix(".mask.png")), left)
    fill, clip = np.array(CLIP_MEAN), TorchClip(world / "clip")
    shown = [np.asarray(Image.open(path)) for path in sorted(images.glob("teal_cup/*_?.png"))]
    masks = [given if path == snow[0] else left for path in sorted(images.glob("teal_cup/*_?.png"))]
    crops = [masked_crop(p, m, fill) for p, m in zip(shown, masks, strict=True)]
    real = clip.images([masked_crop(np.asarray(Image.open(photo.path)), left, fill)])
    expected = (clip.images(crops) @ real.T).mean()
    assert total.image_alignment_masked == pytest.approx(expected, abs=1e-5)
    again = Scorer(scorer.clip, prompts).score(subject, references, images).total
    assert again == total


def test_prior_preservation(output):
    for scores in scores_of(output)["prior_preservation"].values():
        assert scores["off_identical"] is True
        assert scores["other_identical"] is True
        assert scores["images"] == 2
        assert scores["drift"] > 0
        assert 0 <= scores["class_kept"] <= 1
    forced = read_metadata(next((output / "images" / "teal_cup" / "prior").glob("ball--*.png")))
    assert forced["concepts"][0]["when"] == "always"


def test_table_rows_and_intervals(output):
    with (output / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows if row["method"] == "CatVersion"] == [
        "prompt",
        "prompt",
        "concept",
    ] * 2 + ["mean", "low", "high"]
    values = [float(r["image_alignment"]) for r in rows if r["row"] == "concept"][:2]
    ours = [row for row in rows if row["method"] == "CatVersion"]
    mean, low, high = (float(row["image_alignment"]) for row in ours[-3:])
    assert mean == pytest.approx(sum(values) / 2, abs=1e-6)
    assert (low, high) == pytest.approx((min(values), max(values)), abs=1e-6)
    assert [p["step"] for p in scores_of(output)["curves"]["teal_cup"]] == [10, 20]
    plain = scores_of(output)["methods"]["plain model"]["concepts"]
    assert plain[0]["image_alignment"] != values[0]


def test_protocol(world, output):
    protocol = scores_of(output)["protocol"]
    assert protocol["model"] == str(world / "model")
    assert (protocol["sampler"], protocol["num_inference_steps"]) == ("ddim", 2)
    assert (protocol["height"], protocol["seeds"], protocol["batch_size"]) == (64, [0, 1], 4)
    assert len(protocol["text encoder sha256"]) == 64
    assert "sha256" in protocol["clip"]
    assert "10 % margin" in protocol["masks"]
    assert "catversion_jax" in protocol["software"]
