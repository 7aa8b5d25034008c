"""``catversion evaluate`` end to end on a random model, scored again with torch and looked at in
Chromium.
"""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from random_model import write_random_model, write_toy_concepts
from tiny_pipelines import save_clip, save_vit
from torch_reference import randomise

from catversion_jax.cli import main
from catversion_jax.concepts import ImageSource, read_concepts
from catversion_jax.config import TrainConfig, dump_config
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation import load_prompt_set
from catversion_jax.evaluation.masked_crops import masked_crop
from catversion_jax.evaluation.scoring import Scorer
from catversion_jax.evaluation.subjects import Subject, read_references, subjects_of_images
from catversion_jax.methods.concept_file import save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.embedders import CLIP_MEAN, ClipEmbedder
from catversion_jax.sampling.png import read_metadata

PROMPTS = ["a {} in the snow", "a wet {} & <script>document.title = 'owned'</script>"]
NAMES = {"striped_ball": "ball", "teal_cup": "cup"}
WITHOUT_MASKS = shutil.ignore_patterns("*.mask.png")
QUICK = ["--num_inference_steps", "2", "--num_images_per_prompt", "2", "--num_prior_images", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a CLIP, a DINO, toy concepts and a run that learned two of them (random numbers)."""
    root = tmp_path_factory.mktemp("world")
    write_random_model(root / "model")
    write_toy_concepts(root / "concepts")
    save_clip(root / "clip", root / "model" / "tokenizer")
    save_vit(root / "dino")
    run = root / "run"
    for seed, (name, word) in enumerate(NAMES.items()):
        for file, step in (("catversion-000010", 10), ("catversion", 20)):
            rng = np.random.default_rng(seed + step)
            key, value = rng.normal(size=(2, 3, 1, 4, 16)).astype(np.float32)
            residual = KVResidual(key, value, (3, 4, 5))
            path = run / "concepts" / name / f"{file}.safetensors"
            save_concept(path, residual, base_class=word, name=name, step=step)
        rows = "step,loss,eval_loss\n0,,0.9\n10,0.5,0.8\n20,0.4,0.7\n"
        (run / "concepts" / name / "metrics.csv").write_text(rows)
    config = TrainConfig(concepts=str(root / "concepts"), output_dir=str(run))
    (run / "config.resolved.yaml").write_text(dump_config(config))
    (run / "run.json").write_text(json.dumps({"base_model": str(root / "model")}))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def evaluate(world, source, output, *more):
    given = {"--clip": world / "clip", "--output_dir": output, "--prompts": world / "prompts.txt"}
    options = [str(word) for pair in given.items() for word in pair]
    return main(["evaluate", str(source), *options, *QUICK, *map(str, more)])


@pytest.fixture(scope="module")
def output(world):
    """Everything the command can do, once."""
    more = ["--plain", "--all_steps", "--dino", world / "dino"]
    assert evaluate(world, world / "run", world / "out", *more) == 0
    return world / "out"


def scores_of(output):
    return json.loads((output / "scores.json").read_text())


def pictures(folder):
    return [np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))]


class TorchClip:
    """The same scores from transformers in torch."""

    def __init__(self, folder):
        self.model = transformers.CLIPModel.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )

    @torch.no_grad()
    def images(self, arrays):
        pixels = [
            self.processor(Image.fromarray(a), return_tensors="pt")["pixel_values"] for a in arrays
        ]
        pooled = self.model.vision_model(torch.cat(pixels)).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled)).numpy()

    @torch.no_grad()
    def texts(self, prompts):
        ids = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=48, return_tensors="pt"
        )["input_ids"]
        pooled = self.model.text_model(ids).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled)).numpy()


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


def pictures_of(folder, key):
    return [np.asarray(Image.open(p)) for p in sorted(folder.glob(f"*{key}*_?.png"))]


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
        entries.append({"name": name, "path": str(world / "concepts" / name)})
    (tmp_path / "list.json").write_text(json.dumps(entries))
    given = ["--concepts", tmp_path / "list.json", "--base_class", "toy"]
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


@torch.no_grad()
def dino_vectors(model, arrays):
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    pixels = [processor(Image.fromarray(a), return_tensors="pt")["pixel_values"] for a in arrays]
    states = model(torch.cat(pixels)).last_hidden_state[:, 0]
    return torch.nn.functional.normalize(states).numpy()


@pytest.mark.slow
def test_the_same_command_gives_the_same_digits(world, output, tmp_path):
    more = ["--plain", "--all_steps", "--dino", world / "dino"]
    assert evaluate(world, world / "run", tmp_path, *more) == 0
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
    more = ["--plain", "--all_steps", "--dino", world / "dino"]
    assert evaluate(world, world / "run", tmp_path / "out", *more) == 0
    total, kept = map(
        int, re.search(r"(\d+) images, (\d+) of them", capsys.readouterr().out).groups()
    )
    assert total - kept == 1
    assert lost.read_bytes() == bits


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
        ("model", ["--concepts", "concepts"], r"neither a run .*<concept>/<prompt>_<seed>.png"),
    ],
)
def test_wrong_input_says_what_to_do(world, tmp_path, capsys, source, more, message):
    given = [str(world / word) if (world / word).exists() else word for word in more]
    assert evaluate(world, world / source, tmp_path / "out", *given) == 2
    assert re.search(message, capsys.readouterr().err)


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
