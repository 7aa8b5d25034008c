"""The Python API: train, generate and evaluate without the command line."""

import importlib
import inspect
import json
import signal
import threading

import jax
import numpy as np
import pytest
from random_model import write_toy_concepts

import catversion_jax as cv
from catversion_jax.errors import CatVersionError
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.png import read_metadata
from catversion_jax.sampling.prompts import Prompt
from catversion_jax.sampling.requests import ImageRequest


def test_public_names_are_there_and_documented():
    assert set(cv.__all__) >= {
        "train", "TrainConfig", "load_config", "read_concepts", "generate", "evaluate",
        "KVResidual", "load_backbone", "load_concept", "save_concept", "load_text_encoder",
        "import_official_concept",
    }  # fmt: skip
    for name in cv.__all__:
        assert inspect.getdoc(getattr(cv, name))
    for name in ("train", "generate", "evaluate"):
        doc = inspect.getdoc(getattr(cv, name))
        assert "Args:" in doc
        assert "Returns:" in doc
        assert "Raises:" in doc
        for parameter in inspect.signature(getattr(cv, name)).parameters:
            assert f"  {parameter}:" in doc


@pytest.fixture(scope="module")
def trained(one_block_sd_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    write_toy_concepts(root / "concepts")
    config = cv.TrainConfig(
        concepts=str(root / "concepts"),
        pretrained_model_name_or_path=str(one_block_sd_folder),
        output_dir=str(root / "run"),
        max_train_steps=4,
        eval_steps=2,
        validation_steps=None,
        layers="last2",
        compilation_cache_dir=None,
        report_to="none",
    )
    before = signal.getsignal(signal.SIGINT)
    result = cv.train(config)
    assert signal.getsignal(signal.SIGINT) is before
    return config, result


def test_train_returns_concepts_files_and_losses(trained):
    config, result = trained
    assert result.output_dir == result.output_dir.__class__(config.output_dir)
    assert result.finished == tuple(concept.name for concept in result.concepts)
    assert not result.interrupted
    assert len(result.concepts) == 3
    for concept in result.concepts:
        assert concept.state == "done"
        assert [step for step, _ in concept.losses] == [0, 2, 4]
        learned = cv.load_concept(concept.file)
        assert (learned.name, learned.base_class) == (concept.name, concept.base_class)
        assert learned.step == 4
        summary = json.loads(concept.file.with_name("metrics.json").read_text())
        assert summary == {
            "eval_loss": concept.losses[-1][1],
            "plain_eval_loss": concept.plain_loss,
        }


def test_train_again_with_loaded_networks_changes_nothing(trained):
    config, result = trained
    files = {concept.name: concept.file.read_bytes() for concept in result.concepts}
    stop = threading.Event()
    again = cv.train(config, backbone=result.backbone, stop=stop)
    assert again.finished == result.finished
    assert {concept.name: concept.file.read_bytes() for concept in again.concepts} == files


def test_generate_draws_what_the_engine_draws(trained, tmp_path):
    _, result = trained
    backbone, concept = result.backbone, result.concepts[0]
    word = concept.base_class
    drawn = cv.generate(
        [f"a {word}", Prompt("a sphere", concepts=(), seed=7)],
        {concept.file: 0.5},
        model=backbone,
        seeds=[3, 4],
        output_dir=tmp_path / "out",
        num_inference_steps=2,
    )
    assert drawn.images.shape == (4, 16, 16, 3)
    assert drawn.images.dtype == np.uint8
    assert [request.seed for request in drawn.requests] == [3, 4, 7, 8]
    assert [len(request.concepts) for request in drawn.requests] == [1, 1, 0, 0]
    assert drawn.requests[0].concepts[0].scale == 0.5
    from catversion_jax.config import SamplingSettings

    plain = draw_requests(
        backbone, [ImageRequest("a sphere", seed=8)], SamplingSettings(num_inference_steps=2)
    )
    np.testing.assert_array_equal(drawn.images[3], plain.images[0])
    assert len(drawn.files) == 4
    assert read_metadata(drawn.files[0])["concepts"][0]["acts"]
    assert [grid.name for grid in drawn.grids] == ["grid-00000.png"]


def test_forms_of_the_concepts_argument(trained):
    from catversion_jax.sampling.concept_shelf import ConceptShelf

    _, result = trained
    one, other = (concept.file for concept in result.concepts[:2])
    loaded = cv.load_concept(one)
    for form, scales in [
        (one, [1.0]),
        (str(one.parent), [1.0]),
        (f"{one}:0.8", [0.8]),
        ((one, 0.8), [0.8]),
        (loaded, [1.0]),
        ((loaded, 2.0), [2.0]),
        ([one, (other, 0.5)], [1.0, 0.5]),
        ((one, other), [1.0, 1.0]),
        ({one: 0.5, other: 2.0}, [0.5, 2.0]),
        ((), []),
    ]:
        (request,) = ConceptShelf(form).requests([Prompt("a thing")], [0])
        assert [use.scale for use in request.concepts] == scales
    with pytest.raises(CatVersionError, match="Give each once"):
        ConceptShelf([one, loaded])
    with pytest.raises(CatVersionError, match="at least one prompt"):
        cv.generate([], one, model=result.backbone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_keep_all_their_bits_whoever_loads_the_model(tiny_sd_folder, dtype):
    """What the compiler is told: HIGHEST in the encoder's products, for every loading function."""
    loading = importlib.import_module("catversion_jax.models.stable_diffusion")
    for load in (loading.load_backbone, loading.load_model):
        jax.config.update("jax_default_matmul_precision", None)
        backbone = load(tiny_sd_folder, dtype=dtype)
        ids = np.zeros((1, 24), np.int32)
        text = (
            jax.jit(lambda encoder, ids: encoder(ids)).lower(backbone.text_encoder, ids).as_text()
        )
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products
        if dtype == "float32":
            assert all("HIGHEST" in line for line in products)
    jax.config.update("jax_default_matmul_precision", "highest")
