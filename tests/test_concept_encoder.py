"""The concept encoder's fit, by command and by options; runs that start from its predictions."""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from running import final_files, run_here

from catversion_jax import load_concept
from catversion_jax.assets import embedded_folder
from catversion_jax.cli import fit_start, main
from catversion_jax.concepts import read_concepts
from catversion_jax.config import FitOptions, TrainConfig
from catversion_jax.config.options import statement_of
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_encoder import (
    Whitening,
    load_concept_encoder,
    new_weights,
)
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.embedders import ClipEmbedder
from catversion_jax.models.stable_diffusion import abstract_backbone, load_backbone
from catversion_jax.runtime.sharding import make_mesh, replicated
from catversion_jax.training.fit_start import fit_encoder, learning_rates, read_examples
from catversion_jax.training.predicted_start import clip_for

pytest.importorskip("torch")
from tiny_pipelines import save_clip

SIDE, NUM_CONCEPTS = 16, 9
METHOD = {"num_positions": 2, "layers": "last2", "scope": "from_class_word"}


@pytest.fixture(scope="module")
def place(made_once, one_block_sd_folder: Path) -> Path:
    """Nine concepts of noise, and a CLIP that sees them."""

    def write(folder: Path) -> None:
        for number in range(NUM_CONCEPTS):
            concept = folder / "concepts" / f"thing{number}"
            concept.mkdir(parents=True)
            word = ("cup", "dog", "ball")[number % 3]
            (concept / "concept.json").write_text(json.dumps({"base_class": word}))
            for index in range(1 + number % 3):
                pixels = np.random.default_rng((number, index)).integers(0, 256, (SIDE, SIDE, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(concept / f"{index}.png")
        save_clip(folder / "clip", one_block_sd_folder / "tokenizer")

    return made_once("concept-encoder", write)


@pytest.fixture(scope="module")
def fitted(made_once, place: Path, one_block_sd_folder: Path) -> Path:
    """Fitted by the command."""

    def fit(folder: Path) -> None:
        command = ["fit-start", str(place / "concepts"), "--out", str(folder / "start.safetensors")]
        command += ["--clip", str(place / "clip"), "--num_steps", "4", "--batch_size", "4"]
        command += ["--held_out", "0", *(f"{k}={v}" for k, v in METHOD.items())]
        model = f"pretrained_model_name_or_path={one_block_sd_folder}"
        assert main([*command, model, "num_eval_samples=2"]) == 0

    return made_once("fitted-concept-encoder", fit) / "start.safetensors"


@pytest.mark.slow  # compiles the step of the fit twice
def test_devices_share_the_batch_of_a_fit(place, one_block_sd_folder):
    """The same weights on one device and on two."""
    config = TrainConfig(concepts="x", init="class_word", **METHOD)
    method, objective = config.method_options, config.objective_options
    clip = ClipEmbedder(place / "clip")
    specs = read_concepts(place / "concepts").concepts
    found = []
    for count in (1, 2):
        mesh = make_mesh(1, jax.devices()[:count])
        backbone = load_backbone(one_block_sd_folder, sharding=replicated(mesh))
        examples, failures = read_examples(
            specs, backbone, config.data_options, method, objective, clip, seed=0
        )
        assert len(examples) == NUM_CONCEPTS
        assert not failures
        options = FitOptions(num_steps=4, batch_size=4, rank=32)
        encoder = fit_encoder(
            examples, backbone, mesh, method, objective, options, clip_name="clip", clip=clip
        )
        found.append(encoder.weights)
    new = new_weights(found[0].linear.shape[0], found[0].basis.shape[1], 32, 0)
    for one, other, before in zip(*map(jax.tree.leaves, (*found, new)), strict=True):
        moved = np.abs(one - before).max()
        assert moved > 0
        assert np.abs(one - other).max() < 1e-3 * moved


def trained(model: Path, place: Path, fitted: Path, output: Path, **options: object) -> int:
    given = METHOD | {"start": fitted, "start_clip": place / "clip"} | options
    return run_here(model, place / "concepts", output, init="predicted", **given)


def predicted(place: Path, fitted: Path, backbone, name: str) -> KVResidual:
    """From the file and the folder, by parts that test_concept_encoder_formula.py compares."""
    config = TrainConfig(concepts="x", init="class_word", **METHOD)
    clip = ClipEmbedder(place / "clip")
    specs = [s for s in read_concepts(place / "concepts").concepts if s.name == name]
    (example,), _ = read_examples(
        specs, backbone, config.data_options, config.method_options, config.objective_options,
        clip, seed=0,
    )  # fmt: skip
    encoder = load_concept_encoder(fitted)
    return encoder.start(example.photos, example.word, example.concept.learned)


def test_no_updates_write_the_prediction_or_the_class_word(
    one_block_sd_folder, place, fitted, tmp_path, caplog
):
    """A prediction that is no better than the plain model is not taken."""
    options = {"max_train_steps": 0, "eval_steps": 1, "concepts_per_device": 1}
    assert trained(one_block_sd_folder, place, fitted, tmp_path / "out", **options) == 0
    files = final_files(tmp_path / "out")
    assert len(files) == NUM_CONCEPTS
    backbone = load_backbone(one_block_sd_folder)
    outcomes = set()
    for name in files:
        folder = tmp_path / "out" / "concepts" / name
        concept = load_concept(folder)
        summary = concept.metrics or json.loads((folder / "metrics.json").read_text())
        start = predicted(place, fitted, backbone, name)
        fell_back = f"{name}: the predicted start has an evaluation loss" in caplog.text
        outcomes.add(fell_back)
        difference = np.abs(concept.learned.key - start.key).max()
        assert (difference < 1e-5) is not fell_back
        assert concept.step == 0
        assert fell_back or summary["eval_loss"] < summary["plain_eval_loss"]
    assert outcomes  # both kinds need not occur on noise

    gate = tmp_path / "out" / "evaluation" / "gate.json"
    gate.parent.mkdir()
    gate.write_text(json.dumps({"failed": {"thing2": {"updates": 0}}}))
    again = options | {"retrain": "failed"}
    assert trained(one_block_sd_folder, place, fitted, tmp_path / "out", **again) == 0
    assert load_concept(tmp_path / "out" / "concepts" / "thing2").step == 25


@pytest.mark.slow  # test_teach_is_one_command and test_no_updates... run the same path each time
def test_a_run_starts_from_the_prediction_and_repeats_itself(
    one_block_sd_folder, place, fitted, tmp_path, caplog
):
    few = tmp_path / "few" / "concepts"
    for name in ("thing2", "thing5"):
        shutil.copytree(place / "concepts" / name, few / name)
    shutil.copytree(place / "clip", tmp_path / "few" / "clip")
    options = {"max_train_steps": 2, "learning_rate": 1e-3}
    for output in ("first", "second"):
        assert trained(one_block_sd_folder, few.parent, fitted, tmp_path / output, **options) == 0
    first, second = final_files(tmp_path / "first"), final_files(tmp_path / "second")
    assert first == second
    backbone = load_backbone(one_block_sd_folder)
    for name in first:
        learned = load_concept(tmp_path / "first" / "concepts" / name).learned
        start = predicted(place, fitted, backbone, name)
        if f"{name}: the predicted start" not in caplog.text:
            assert 0 < np.abs(learned.key - start.key).max() < 2.5e-3  # two steps of AdamW


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_positions": 1}, "num_positions=1 here, 2 in the file"),
        ({"start": None}, "has no start.safetensors of its own"),
        ({"start_clip": "tiny-sd"}, "is not the CLIP that the concept encoder was fitted with"),
        ({"init": "class_word"}, "is read with init=predicted only"),
    ],
)
def test_what_does_not_fit_is_refused(
    one_block_sd_folder, place, fitted, tmp_path, capsys, changes, message
):
    if changes.get("start_clip"):
        changes = {"start_clip": embedded_folder("tiny-sd") / "clip"}
    given = METHOD | {"init": "predicted", "start": fitted, "start_clip": place / "clip"} | changes
    given = {k: "null" if v is None else v for k, v in given.items()}
    assert run_here(one_block_sd_folder, place / "concepts", tmp_path / "out", **given) == 2
    assert message in capsys.readouterr().err


def test_another_models_start_is_refused(one_block_sd_folder, place, fitted, tmp_path, capsys):
    other = dataclasses.replace(
        load_concept_encoder(fitted), fingerprints={"text_encoder_sha256": "0" * 64}
    ).save(tmp_path / "other.safetensors")
    assert trained(one_block_sd_folder, place, other, tmp_path / "out") == 2
    assert "was fitted for a text encoder of text_encoder_sha256 0000" in capsys.readouterr().err


def test_teach_is_one_command(one_block_sd_folder, place, fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = sorted(map(str, (place / "concepts" / "thing2").glob("*.png")))
    command = ["teach", *photos, "--base_class", "owl", "--model", str(one_block_sd_folder)]
    command += ["--updates", "0", "--start", str(fitted), f"start_clip={place / 'clip'}"]
    assert main([*command, "num_eval_samples=2"]) == 0  # the file says the options of METHOD
    concept = load_concept(tmp_path / "taught" / "owl" / "concepts" / "owl")
    assert (concept.base_class, concept.images) == ("owl", ("0.png", "1.png", "2.png"))
    assert concept.train_config["init"] == "predicted"
    assert "--prompt 'an owl on the beach'" in capsys.readouterr().out
    folder = place / "concepts" / "thing0"
    assert main(["teach", str(folder), "--base_class", "cup", "--model", "nowhere"]) == 2
    assert main(["teach", "lr=1", "--base_class", "cup"]) == 2
    assert "PHOTOS: none given" in capsys.readouterr().err


@pytest.mark.slow  # a server that compiles everything: 20 s
def test_a_server_draws_with_a_prediction_and_refines_it(
    one_block_sd_folder, place, fitted, tmp_path
):
    """A concept has a file as soon as it has a row, long before its updates are done."""
    pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")
    from starlette.testclient import TestClient

    from catversion_jax.cli.serve import teaching_config
    from catversion_jax.config.serving import ServeOptions
    from catversion_jax.serving.app import make_app
    from catversion_jax.serving.server import Server

    chosen = ServeOptions(
        model=str(one_block_sd_folder),
        output_dir=str(tmp_path),
        preset="fast",
        updates=100_000,
        rows=1,
    )
    given = METHOD | {"init": "predicted", "start": str(fitted), "start_clip": str(place / "clip")}
    server = Server(chosen, dataclasses.replace(teaching_config(chosen), **given))
    with TestClient(make_app(server), base_url="http://127.0.0.1") as client:
        assert server.device.compiled.wait(300)
        client.put("/v1/concepts/cup", json={"base_class": "cup"})
        for index, path in enumerate((place / "concepts" / "thing2").glob("*.png")):
            client.put(f"/v1/concepts/cup/photos/{index}", content=path.read_bytes())
        job = client.post("/v1/jobs", json={"kind": "teach", "concept": "cup"}).json()
        while not client.get("/v1/concepts/cup").json()["is_usable"]:
            assert client.get(f"/v1/jobs/{job['id']}").json()["status"] != "failed"
            time.sleep(0.01)
        first = load_concept(server.core.folders.newest(job["id"]))
        assert first.step == 0
        body = {"prompt": "a cup", "model": "cup", "seed": 1, "num_inference_steps": 2}
        assert client.post("/v1/images/generations", json=body).status_code == 200
        step = 0
        while step == 0:  # it goes on
            now = client.get(f"/v1/jobs/{job['id']}").json()
            step = now["step"]
            time.sleep(0.01)
        assert now["status"] == "processing"
        assert client.get("/v1/concepts/cup/file").status_code == 404  # that is the refined one
        client.post(f"/v1/jobs/{job['id']}/cancel")


def test_zero_updates_are_for_predictions(one_block_sd_folder, place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(one_block_sd_folder, place / "concepts", out, max_train_steps=0) == 2
    assert "Use 1 or more, or init=predicted" in capsys.readouterr().err


def test_too_few_concepts_are_refused(one_block_sd_folder, place, tmp_path, capsys):
    command = ["fit-start", str(place / "concepts" / "thing0"), "--out", str(tmp_path / "x")]
    model = f"pretrained_model_name_or_path={one_block_sd_folder}"
    assert main([*command, "--clip", str(place / "clip"), model]) == 2
    assert "concepts to fit on: must be at least 8" in capsys.readouterr().err


def test_an_option_of_a_fit_is_stated_once():
    parser = argparse.ArgumentParser()
    fit_start.add_arguments(parser)
    given = parser.parse_args(["concepts", "--out", "start.safetensors"])
    shown = {action.dest: action.help for action in parser._actions}
    for field in dataclasses.fields(FitOptions):
        assert field.name not in given  # so the default is that of the group
        help = statement_of(FitOptions, field.name).help
        assert shown[field.name] == f"{help} [{field.default}]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("num_steps=0", "num_steps=0: must be at least 1."),
        ("learning_rate=0", "learning_rate=0.0: must be at least 1e-09 and below 1."),
        ("rank=5000", "rank=5000: must be within 1..4096."),
        ("held_out=1", "held_out=1.0: must be at least 0 and below 1."),
        ("seed=2147483648", "seed=2147483648: must be at least 0 and at most 2147483647."),
    ],
)
def test_options_of_a_fit_out_of_range_are_refused(given, message, capsys):
    name, value = given.split("=")
    assert main(["fit-start", "x", "--out", "y", f"--{name}", value]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seed=5", "this command gives seed itself. Say it with --seed."),
        ("learning_rate=0.9", "Say it with --learning_rate."),
        ("max_train_steps=5", "Say it with --num_steps."),
        ("output_dir=x", "Say it with --out."),
        ("start_clip=x", "Say it with --clip."),
        ("eval_steps=5", "catversion fit-start does not look at eval_steps. Leave it out."),
    ],
)
def test_options_that_a_fit_would_ignore_are_refused(given, message, capsys):
    assert main(["fit-start", "x", "--out", "y", given]) == 2
    assert message in capsys.readouterr().err


def test_the_file_of_a_fit_is_looked_at_before_the_work(tmp_path, capsys):
    """The concepts are nowhere, which would be said next."""
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path, "is a folder. Give the file"),
        (tmp_path / "file" / "x", "cannot be"),
    ):
        assert main(["fit-start", "nowhere", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_a_clip_that_is_given_is_not_the_models_own(place, tmp_path, monkeypatch, caplog):
    tiny = abstract_backbone("tiny-sd")
    assert clip_for(None, tiny)[0] == "clip"
    monkeypatch.chdir(place)
    name, clip = clip_for("clip", tiny)
    assert (name, clip.sha256) == ("./clip", ClipEmbedder(place / "clip").sha256)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatVersionError, match=r"CLIP './clip': no such folder"):
        clip_for("clip", tiny)


def test_other_colours_are_another_clip(place, tmp_path):
    shutil.copytree(place / "clip", tmp_path / "clip")
    before = ClipEmbedder(tmp_path / "clip").sha256
    assert before == ClipEmbedder(place / "clip").sha256
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(grey))
    assert ClipEmbedder(tmp_path / "clip").sha256 != before


def test_damaged_numbers_of_a_start_are_the_file_s_fault(
    one_block_sd_folder, place, fitted, tmp_path, capsys
):
    encoder = load_concept_encoder(fitted)
    for seed in (-5, 2**70):
        file = dataclasses.replace(encoder, noise_seed=seed).save(tmp_path / "seed.safetensors")
        with pytest.raises(CatVersionError, match=r"the file is damaged.*noise_seed"):
            load_concept_encoder(file)
    wide = Whitening(
        np.pad(encoder.photos.mean, (0, 1)), np.pad(encoder.photos.components, ((0, 1), (0, 0)))
    )
    file = dataclasses.replace(encoder, photos=wide).save(tmp_path / "wide.safetensors")
    assert trained(one_block_sd_folder, place, file, tmp_path / "out") == 2
    assert "the file is damaged: it is for vectors of" in capsys.readouterr().err


@pytest.mark.parametrize("num_steps", [1, 2, 30, 1500])
def test_a_fit_of_any_length_reaches_its_learning_rate(num_steps):
    rates = [float(learning_rates(FitOptions(num_steps=num_steps))(i)) for i in range(num_steps)]
    assert max(rates) == pytest.approx(FitOptions.learning_rate)
    assert np.isfinite(rates).all()
