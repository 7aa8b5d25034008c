"""``catversion check`` from the outside: its table, its warnings, its exit codes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image, ImageOps

from catversion_jax.cli import main


def photo(seed: int, side: int = 64, mode: str = "RGB") -> Image.Image:
    """A picture with large shapes, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, len(mode)), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def circle(side: int) -> Image.Image:
    """A mask: white in the middle."""
    y, x = np.mgrid[:side, :side] - side / 2
    return Image.fromarray(((x**2 + y**2 < (side / 3) ** 2) * 255).astype(np.uint8))


def concept(
    folder: Path, count: int = 3, base_class: str = "cup", side: int = 64, **fields: object
) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        photo(sum(map(ord, folder.name)) + i, side).save(folder / f"{i}.png")
    (folder / "concept.json").write_text(json.dumps({"base_class": base_class, **fields}))
    return folder


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_clean_folder_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concept(tmp_path / "red_cup", prompts=["a photo of a {}", "my {}"])
    concept(tmp_path / "bear", 4, "stuffed animal")
    (tmp_path / "bear" / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    code, text = check(capsys, tmp_path, "--resolution", 64)
    assert code == 0
    lines = text.splitlines()
    assert lines[0].split() == [
        "name",
        "base",
        "class",
        "other",
        "forms",
        "images",
        "masks",
        "smallest",
        "side",
        "prompts",
    ]
    assert lines[1].split() == [
        *("bear", "stuffed", "animal", "stuffed", "animals", "4", "-", "64", "stuffed", "animal")
    ]
    assert lines[2] == "    skipped: notes.txt"
    assert lines[3].split() == [
        "red_cup",
        "cup",
        "cups",
        "3",
        "-",
        "64",
        "a",
        "photo",
        "of",
        "a",
        "cup",
        "(+1",
        "more)",
    ]
    assert lines[4:] == ["skipped: README.md", "2 concepts, 2 ready to train"]
    assert "warning" not in text


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concept(tmp_path / "few", 2)
    concept(tmp_path / "many", 11)
    small = concept(tmp_path / "small")
    photo(99, 40).save(small / "3.png")
    same = concept(tmp_path / "same")
    (same / "copy.png").write_bytes((same / "0.png").read_bytes())
    near = concept(tmp_path / "near", side=200)
    Image.open(near / "0.png").resize((150, 150)).save(near / "again.jpg", quality=70)
    masks = concept(tmp_path / "masks_for_some")
    for name in ("0", "9"):
        circle(64).save(masks / f"{name}.mask.png")
    alpha = concept(tmp_path / "see_through")
    photo(7, mode="RGBA").save(alpha / "3.png")
    code, text = check(capsys, tmp_path, "--resolution", 64, "--json")
    assert code == 0
    warnings = {report["name"]: report["warnings"] for report in json.loads(text)["concepts"]}
    assert warnings == {
        "few": ["only 2 images; 3 to 10 are usual"],
        "many": ["11 images; 3 to 10 are usual"],
        "small": ["smaller than 64, will be scaled up: 3.png 40x40"],
        "same": ["0.png and copy.png are the same picture"],
        "near": ["0.png and again.jpg are nearly the same picture"],
        "masks_for_some": [
            "mask 9.mask.png has no image",
            "masks for 1 of 3 images only; without: 1.png, 2.png",
        ],
        "see_through": ["transparent parts become white (alpha=mask also masks them): 3.png"],
    }


def test_problems_give_exit_code_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concept(tmp_path / "good")
    cut = concept(tmp_path / "cut")
    (cut / "1.png").write_bytes((cut / "1.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    concept(tmp_path / "lost", prompts=["a photo of a dog"])
    code, text = check(capsys, tmp_path, "--resolution", 64)
    assert code == 3
    assert "1.png: cannot be decoded" in text
    assert "no image in it" in text
    assert "does not contain the base class 'cup'" in text
    assert text.splitlines()[-1] == "4 concepts, 1 ready to train"
    # Under when=always a prompt need not name the concept.
    _, text = check(capsys, tmp_path, "--resolution", 64, "--when", "always")
    assert text.splitlines()[-1] == "4 concepts, 2 ready to train"


def test_the_run_s_template_must_name_the_concept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concept(tmp_path / "cup")
    code, text = check(capsys, tmp_path, "--instance_prompt", "a photo", "--resolution", 64)
    assert code == 3
    assert "does not contain the base class" in text
    code, text = check(capsys, tmp_path, "--instance_prompt", "style", "--resolution", 64)
    assert code == 0
    assert "a painting in the style of cup (+4 more)" in text


def test_usage_errors_give_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = check(capsys, tmp_path / "nowhere")
    assert code == 2
    assert text.startswith("error: ")
    assert "not found" in text
    code, text = check(capsys, concept(tmp_path / "cup"), "--model", tmp_path / "no_model")
    assert code == 2
    assert "no_model: the folder does not exist, and this is not a hub id" in text


def test_resolution_zero_is_not_the_model_s_own(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = concept(tmp_path / "cup", side=12)
    for model in ((), ("--model", tiny_sd_folder)):
        for side in (0, -64, 7):
            code, text = check(capsys, folder, "--resolution", side, *model)
            assert code == 2
            assert f"--resolution {side}: must be at least 8" in text
        code, text = check(capsys, folder, "--resolution", 8, *model)
        assert code == 0
        assert "scaled up" not in text
    code, text = check(capsys, folder, "--model", tiny_sd_folder)
    assert "smaller than 16, will be scaled up" in text  # the tiny model's own


def test_a_model_of_the_hub_says_how_it_reads_the_words(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """From the hub's cache, which holds no weights."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, weights = tmp_path / "hub" / "models--someone--tiny", "*.safetensors"
    shutil.copytree(
        tiny_sd_folder, repository / "snapshots" / "0", ignore=shutil.ignore_patterns(weights)
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    concept(tmp_path / "cup", base_class="b" * 23)
    code, text = check(capsys, tmp_path / "cup", "--model", "someone/tiny")
    assert code == 0
    assert "the model reads only 22" in text


def test_words_longer_than_the_context(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's tokenizer knows letters only and its context is 24: 22 letters fit."""
    concept(tmp_path / "fits", base_class="a" * 22)
    concept(tmp_path / "long", base_class="b" * 23)
    concept(tmp_path / "prompt", base_class="cup", prompts=["a {} standing on a very long table"])
    code, text = check(capsys, tmp_path, "--model", tiny_sd_folder, "--json")
    assert code == 0
    reports = {report["name"]: report for report in json.loads(text)["concepts"]}
    assert reports["fits"]["warnings"] == []  # at the model's own resolution, 16
    assert any(
        "has 23 tokens, the model reads only 22" in line for line in reports["long"]["warnings"]
    )
    (warning,) = reports["prompt"]["warnings"]
    assert warning.endswith("cut off: 'g table'")  # its first 22 of 28 letters are read


def test_masks_that_look_wrong_are_named_unless_they_are_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, fields in (("doubtful", {}), ("meant", {"mask_polarity": "black"})):
        folder = concept(tmp_path / name, **fields)
        for i in range(3):
            ImageOps.invert(circle(64)).save(folder / f"{i}.mask.png")
    code, text = check(capsys, tmp_path, "--resolution", 64, "--json")
    assert code == 0
    doubtful, meant = json.loads(text)["concepts"]
    (warning,) = doubtful["warnings"]
    assert warning.startswith("0.png, 1.png, 2.png: the mask is white along the whole border")
    assert meant["warnings"] == []
    _, text = check(capsys, tmp_path, "--resolution", 64, "--mask_polarity", "white")
    assert "warning" not in text


def test_check_needs_no_accelerator(tmp_path: Path) -> None:
    concept(tmp_path / "cup")
    code = (
        "import sys; from catversion_jax.cli import main; code = main(['check', "
        f"{str(tmp_path)!r}]); assert 'jax' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_thousand_photos_are_compared_soon(tmp_path, capsys) -> None:
    shots = tmp_path / "cup"
    shots.mkdir()
    for i in range(1000):
        photo(i, 5).save(shots / f"{i}.png", compress_level=0)
    photo(3, 5).save(shots / "999.png")  # far away, and still found to be the same
    began = time.perf_counter()
    _, text = check(capsys, shots, "--base_class", "cup")
    assert time.perf_counter() - began < 30  # 2 s; comparing all pairs took 40
    assert "3.png and 999.png are the same picture" in text


@pytest.mark.parametrize("value", ["0", "-1", "179"])
def test_the_pixel_budget_has_the_range_of_training(tmp_path, capsys, value: str) -> None:
    code, text = check(capsys, concept(tmp_path / "cup"), "--max_megapixels", value)
    assert code == 2
    assert "must be within 0.01..178" in text
