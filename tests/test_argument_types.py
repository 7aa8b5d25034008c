"""The Python API with values of any type: a result, or one error that says what belongs there."""

import itertools

import numpy as np
import pytest

import catversion_jax as cv
from catversion_jax.errors import CatVersionError
from catversion_jax.sampling.prompts import Prompt


@pytest.fixture(scope="module")
def backbone(one_block_sd_folder):
    return cv.load_backbone(one_block_sd_folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": value}, "must be text or a Prompt")
        for value in (None, 5, b"a cat", [None], [5], ["a cat", ["a"]], object())
    ]
    + [({"prompts": Prompt(value)}, "prompt .*must be text") for value in (None, 5, b"a")]
    + [({"prompts": Prompt("a", seed=value)}, "seed=") for value in ("1", 1.5, True)]
    + [({"seeds": value}, "seed=") for value in (None, 1.5, "1", [None], [1.5], np.float32(1))]
    + [({"seeds": itertools.count()}, "number of seeds=1001"), ({"seeds": []}, "one seed")]
    + [({"concepts": value}, "concepts=") for value in (5, b"x", object())]
    + [({"concepts": value}, "is no path") for value in ([None], [5], (None, "a"), "a\0b")]
    + [({"concepts": [(1, 2, 3)]}, "a concept and its scale")]
    + [({"prompts": Prompt("a", concepts="rex")}, "concepts='rex' of a prompt row: must be a list")]
    + [
        ({name: value}, f"{name}=.*must be a whole number")
        for name in ("num_inference_steps", "height", "width", "batch_size")
        for value in ("16", 1.5, True, [1])
    ]
    + [
        ({name: value}, f"{name}=.*must be a number")
        for name in ("guidance_scale", "eta")
        for value in ("x", [1], True)
    ]
    + [({"output_dir": value}, "is no path") for value in (5, b"x", ["a"], "a\0b")]
    + [({"latents": value}, "latents of") for value in (5, "x", [], [[1], [1, 2]], object())]
    + [({"model": value}, "is no path") for value in (5, [1], {}, object(), b"x", "a\0b")],
)
def test_generate(backbone, arguments, words) -> None:
    with pytest.raises(CatVersionError, match=words):
        cv.generate(**{"prompts": "a cat", "model": backbone, **arguments})


@pytest.mark.parametrize("value", ["x" * 300, f"{'x' * 300}/y", "é" * 128, "ab/" * 1400])
def test_paths_that_no_file_system_takes(backbone, value) -> None:
    for function in (cv.load_concept, cv.load_backbone, cv.load_text_encoder, cv.evaluate):
        with pytest.raises(CatVersionError, match="is too long for a path"):
            function(value)
    with pytest.raises(CatVersionError, match="is too long for a path"):
        cv.load_config(value)
    with pytest.raises(CatVersionError, match="is too long for a path"):
        cv.generate("a cat", value, model=backbone)


@pytest.mark.parametrize("value", [[3], [None], [("seed", 3)], 3, None, "seed=3"])
def test_overrides(value) -> None:
    with pytest.raises(CatVersionError, match="key=value"):
        cv.load_config("quickstart", value)


@pytest.mark.parametrize("value", [None, 5, b"x", [], {}, object(), "a\0b"])
def test_paths_and_configurations(value) -> None:
    with pytest.raises(CatVersionError, match="must be a TrainConfig"):
        cv.train(value)
    functions = [cv.load_concept, cv.load_backbone, cv.load_text_encoder, cv.evaluate]
    for function in (*functions, cv.import_official_concept):
        with pytest.raises(CatVersionError, match="is no path"):
            function(value)
    if value is not None:
        with pytest.raises(CatVersionError, match="is no path"):
            cv.load_config(value)


def test_a_scale_is_a_number(backbone, finished) -> None:
    file = next(finished.glob("concepts/*/catversion.safetensors"))
    for scale in ("x", None, [1], {}):
        with pytest.raises(CatVersionError, match="scale="):
            cv.generate("a cat", [(cv.load_concept(file), scale)], model=backbone, scale="y")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"classes": value}, "classes=.*must be a list") for value in ("dog", None, [1], 5)]
    + [({"scales": value}, "scales=.*must be a list") for value in (None, 0.5, "0.5")]
    + [({"prompts": value}, "prompts=.*must be the name") for value in (None, ["a {}"])]
    + [({"concepts": value}, "concepts=.*must be a path") for value in (5, ["a"], b"x")]
    + [
        ({name: value}, f"{name}=.*must be a whole number")
        for name in ("seed", "num_prior_images")
        for value in (None, "3", 1.5, True)
    ],
)
def test_evaluate(tmp_path, arguments, words) -> None:
    with pytest.raises(CatVersionError, match=words):
        cv.evaluate(tmp_path, **{"prompts": "tiny", **arguments})
