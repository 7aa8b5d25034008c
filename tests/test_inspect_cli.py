"""``catversion inspect`` from the outside: of a concept, of a run, of an official adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="adapters are torch's: pip install '.[test]'")
pytest.importorskip("diffusers", reason="the tiny pipeline is diffusers': pip install '.[test]'")

from exporting import catversion, write_official, write_run  # noqa: E402

from catversion_jax.methods.concept_file import load_concept  # noqa: E402


@pytest.fixture
def run_folder(tmp_path: Path, tiny_sd_folder: Path) -> Path:
    return write_run(tmp_path / "run", tiny_sd_folder)


def test_inspect_names_a_damaged_concept_and_lists_the_others(
    run_folder: Path, tmp_path: Path, capsys
) -> None:
    run = shutil.copytree(run_folder / "concepts", tmp_path / "concepts")
    bad = tmp_path / "concepts" / "bad" / "catversion.safetensors"
    bad.parent.mkdir()
    bad.write_bytes(b"{" * 100)
    code, text = catversion(capsys, "inspect", run)
    assert code == 2
    assert f"{bad}: " in text
    assert str(tmp_path / "concepts" / "tom") in text


def test_inspect(run_folder: Path, tmp_path: Path, capsys) -> None:
    code, text = catversion(capsys, "inspect", run_folder / "concepts" / "tom")
    assert code == 0
    shown = dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
    assert shown["what"] == "CatVersion concept"
    assert shown["layers"] == "1, 2, 3"
    assert shown["step"] == "7"
    code, text = catversion(
        capsys, "inspect", run_folder / "concepts" / "tom" / "catversion.safetensors", "--json"
    )
    facts = json.loads(text)
    residual = load_concept(run_folder / "concepts" / "tom").learned
    expected = [float(torch.tensor(residual.key[i]).norm(dim=-1).mean()) for i in range(3)]
    np.testing.assert_allclose(facts["key_norms"], expected, atol=1e-4)
    assert (facts["base_class"], facts["num_parameters"], facts["logit_bias"]) == ("cat", 192, 1.0)
    code, text = catversion(capsys, "inspect", run_folder)
    assert code == 0
    header, *rows = text.splitlines()
    assert header.split() == ["name", "base", "class", "when", "step", "folder"]
    folders = [run_folder / "concepts" / name for name in ("rex", "tom")]
    assert [row.split() for row in rows] == [
        ["rex", "dog", "class_word", "7", str(folders[0])],
        ["tom", "cat", "class_word", "7", str(folders[1])],
    ]
    code, text = catversion(capsys, "inspect", run_folder, "--json")
    assert json.loads(text)[str(folders[1])] == facts
    write_official(tmp_path / "official")
    code, text = catversion(capsys, "export", tmp_path / "official")
    assert code == 2
    assert f"`catversion import {tmp_path / 'official'} --base_class WORD`" in text
    for path in (tmp_path / "official", tmp_path / "official" / "pytorch_adapter.bin"):
        code, text = catversion(capsys, "inspect", path, "--json", "--num_heads", 4)
        assert code == 0, text
        assert json.loads(text)["layers"] == [2, 3]
    (tmp_path / "noise.safetensors").write_bytes(b"0" * 100)
    code, text = catversion(capsys, "inspect", tmp_path / "noise.safetensors")
    assert code == 2
    assert "not a concept file" in text
