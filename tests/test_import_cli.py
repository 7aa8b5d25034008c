"""``catversion import`` from the outside: official adapters become concept files."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="adapters are torch's: pip install '.[test]'")
pytest.importorskip("diffusers", reason="imports are checked in diffusers: pip install '.[test]'")

from exporting import catversion, draw_with_loader, write_official  # noqa: E402

from catversion_jax.methods.concept_file import load_concept  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


def test_import_an_official_adapter(tmp_path: Path, tiny_sd_folder: Path, capsys) -> None:
    flat = write_official(tmp_path / "my_teapot")
    code, text = catversion(
        capsys, "import", tmp_path / "my_teapot", "--base_class", "teapot", "--num_heads", 4,
        "--model", tiny_sd_folder, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, text
    concept = load_concept(tmp_path / "out" / "my_teapot")
    assert (concept.name, concept.base_class, concept.when) == ("my_teapot", "teapot", "class_word")
    assert concept.learned.logit_bias == 1.0
    assert len(concept.text_encoder_sha256) == 64
    np.testing.assert_array_equal(concept.learned.key[1], flat.view(2, 4, 4, 8)[:, 2].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_with_loader(tiny_sd_folder, tmp_path / "out" / "my_teapot", "a teapot")


def test_import_for_a_model_that_it_does_not_fit(tmp_path, tiny_sd_folder, capsys) -> None:
    write_official(tmp_path / "my_teapot")
    arguments = ["--base_class", "teapot", "--output_dir", tmp_path / "out"]
    code, text = catversion(
        capsys, "import", tmp_path / "my_teapot", *arguments, "--num_heads", 2, "--model",
        tiny_sd_folder,
    )  # fmt: skip
    assert code == 2
    assert "its text encoder has 4 heads x 8 and layers 0..3" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "rule"),
    [("a/b", "path separators"), ("a:b", "':'"), ("", "no name"), ("nul", "device name")],
)
def test_import_refuses_names_that_make_no_folder(tmp_path: Path, capsys, name, rule) -> None:
    write_official(tmp_path / "teapot")
    code, text = catversion(
        capsys, "import", tmp_path / "teapot", "--base_class", "x", f"--name={name}",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert rule in text
    assert "Give another --name" in text
    assert not (tmp_path / "out").exists()


def test_import_says_where_the_fingerprint_comes_from(
    tmp_path: Path, tiny_sd_folder: Path, capsys, caplog
) -> None:
    from catversion_jax.models.weights.fingerprint import text_encoder_sha256
    from catversion_jax.models.weights.safetensors_files import open_checkpoint

    write_official(tmp_path / "teapot")
    half = tmp_path / "half" / "text_encoder"  # fp16 weights only
    half.mkdir(parents=True)
    shutil.copy(
        tiny_sd_folder / "text_encoder" / "model.safetensors", half / "model.fp16.safetensors"
    )
    expected = text_encoder_sha256(open_checkpoint(tiny_sd_folder / "text_encoder"))

    def run(*model):
        arguments = ("--base_class", "x", "--num_heads", 4, "--output_dir", tmp_path / "out")
        code, text = catversion(capsys, "import", tmp_path / "teapot", *arguments, *model)
        return code, text, caplog.text

    code, text, _ = run("--model", tmp_path / "half")
    assert code == 2
    assert "variant='fp16'" in text
    code, text, logged = run("--model", tmp_path / "half", "--variant", "fp16")
    assert (code, logged) == (0, ""), text
    assert load_concept(tmp_path / "out" / "teapot").text_encoder_sha256 == expected
    code, _, logged = run("--model", "some/hub-id")
    assert code == 0
    assert "--model some/hub-id: not here, so the concept file states no finger" in logged
    concept = load_concept(tmp_path / "out" / "teapot")
    assert (concept.base_model, concept.text_encoder_sha256) == ("some/hub-id", "")
