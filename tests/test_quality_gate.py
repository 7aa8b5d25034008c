"""The gate's rules, DreamBench++'s layout, the frontier: each against values written out."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catversion_jax.config.gate import GateSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.charts import frontier_chart
from catversion_jax.evaluation.dreambench_plus import export_dreambench_plus
from catversion_jax.evaluation.frontier import check_scales, frontier_points
from catversion_jax.evaluation.gate import judge, write_gate
from catversion_jax.evaluation.prompts import EvaluationPrompt, PromptSet
from catversion_jax.evaluation.scores import RealImages, Scores, SubjectScores
from catversion_jax.evaluation.subjects import References, Subject

SCORES = Scores(8, 0.5, 0.6, 0.20, 0.1, 0.3, None, None, 0.9, 0, 1, 0, rank1=0.75)
REAL = RealImages(0.95, 0.97, None, 0.99, 3, 3, 0)


def subject(name: str, real: RealImages = REAL, **scores: object) -> SubjectScores:
    total = dataclasses.replace(SCORES, **scores)
    return SubjectScores(name, "dog", total, total, (), real, (0,), ())


def test_each_rule_alone_and_at_its_threshold(tmp_path: Path) -> None:
    subjects = [
        subject("good"),
        subject("edge", rank1=0.5, copies=2, text_alignment_edit=0.195),
        subject("other", rank1=0.375),
        subject("copier", copies=3),
        subject("loud", text_alignment_edit=0.19),
        subject("all", rank1=0.0, copies=8, text_alignment_edit=0.0),
    ]
    plain = [subject(one.name, text_alignment_edit=0.245) for one in subjects]
    updates = {one.name: 200 for one in subjects}
    result = judge(subjects, plain, GateSettings(), updates)
    assert list(result.passed) == ["good", "edge"]
    assert {name: len(reasons) for name, reasons in result.failed.items()} == {
        "other": 1,
        "copier": 1,
        "loud": 1,
        "all": 3,
    }
    assert result.failed["other"] == ["rank-1 0.38 is below 0.5"]
    assert result.failed["copier"] == ["copies 0.38 (3 of 8) are above 0.25"]
    assert result.failed["loud"] == ["text loss 0.055 (0.190, plain model 0.245) is above 0.05"]
    content = json.loads(write_gate(tmp_path / "gate.json", result).read_text())
    assert content["failed"]["loud"]["updates"] == 200
    assert content["thresholds"] == {"rank1": 0.5, "copies": 0.25, "text_loss": 0.05}
    assert (content["passed"], content["not_checked"]) == (["good", "edge"], {})
    assert result.lines()[0] == "gate: 4 of 6 concepts fail"


def test_what_cannot_be_checked_passes_and_is_said() -> None:
    one_photo = dataclasses.replace(REAL, copy_limit=None)
    alone = subject("alone", one_photo, rank1=None, copies=0)
    result = judge([alone], [], GateSettings(), {})
    assert list(result.passed) == ["alone"]
    assert set(result.not_checked) == {"rank1", "copies", "text_loss"}
    assert "  rank not checked: alone" in result.lines()
    strict = judge([subject("rex")], [], GateSettings(rank1=0.8), {})
    assert list(strict.failed) == ["rex"]
    assert "updates" not in strict.as_json()["failed"]["rex"]


@pytest.mark.parametrize("name", ["rank1", "copies", "text_loss"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.5", True])
def test_thresholds_are_shares(name: str, value: object) -> None:
    with pytest.raises(CatVersionError, match=rf"gate_{name}=.*must be within 0\.\.1"):
        GateSettings(**{name: value})  # type: ignore[arg-type]


def test_the_layout_of_dreambench_plus(tmp_path: Path) -> None:
    """As its README shows it; its judges read ``<prompt>_0`` of all three folders."""
    prompts = PromptSet(
        "two", (EvaluationPrompt("a {}", ""), EvaluationPrompt("a {} asleep", "")), 3
    )
    rng = np.random.default_rng(0)
    drawn = {}
    for number in (0, 1):
        for seed in (4, 7, 9):
            drawn[number, seed] = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            path = tmp_path / "images" / "rex" / f"{number}_{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn[number, seed]).save(path)
    photos = [np.full((16, 16, 3), 60 * i, np.uint8) for i in range(4)]
    held_out = References(photos[2:], [None, None])
    known = {"rex": References(photos[:2], [None, None], held_out)}
    subjects = [Subject("rex", "dog", ()), Subject("left-out", "dog", ())]
    out = tmp_path / "out"
    assert export_dreambench_plus(out, tmp_path / "images", subjects, known, prompts) == 6
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    stems = [f"{number}_{n}" for number in (0, 1) for n in (0, 1, 2)]
    expected = [f"{kind}/rex/{stem}.jpg" for kind in ("src_image", "tgt_image") for stem in stems]
    assert names == sorted(
        [*expected, *(f"text/rex/{s}.txt" for s in stems), "negative_prompt.txt"]
    )
    assert (out / "text/rex/1_2.txt").read_text() == "a dog asleep"
    shown = np.asarray(Image.open(out / "tgt_image/rex/1_0.jpg")).astype(int)
    assert np.abs(shown - drawn[1, 4]).mean() < 8  # seeds in order
    sources = [np.asarray(Image.open(out / f"src_image/rex/0_{n}.jpg")).mean() for n in range(3)]
    assert np.round(sources).tolist() == [120, 180, 120]  # held-out photos in turn
    fewer = PromptSet("one", prompts.prompts[:1], 3)
    (tmp_path / "images" / "rex" / "0_9.png").unlink()
    assert export_dreambench_plus(out, tmp_path / "images", subjects, known, fewer) == 2
    left = [p.relative_to(out).as_posix() for p in out.rglob("*_*.*") if p.name[0].isdigit()]
    assert sorted(left) == sorted(
        f"{kind}/rex/0_{n}.{'txt' if kind == 'text' else 'jpg'}"
        for kind in ("src_image", "text", "tgt_image")
        for n in (0, 1)
    )
    shutil.copytree(out / "tgt_image" / "rex", out / "tgt_image" / "tom")
    with pytest.raises(CatVersionError, match=r"holds pictures of tom, which are not of this"):
        export_dreambench_plus(out, tmp_path / "images", subjects, known, prompts)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(CatVersionError, match=r"holds other files.*Give a new folder"):
        export_dreambench_plus(tmp_path / "full", tmp_path / "images", subjects, known, prompts)


def test_frontier_means_and_coordinates() -> None:
    scored = {
        1.0: [subject("a"), subject("b", image_alignment_masked=0.8, text_alignment_edit=0.1)],
        0.5: [subject("a", image_alignment_masked=0.4), subject("b", image_alignment_masked=0.2)],
    }
    low, high = frontier_points(scored)
    assert (low.scale, high.scale) == (0.5, 1.0)
    assert (low.image, low.text) == pytest.approx((0.3, 0.2))
    assert (high.image, high.text) == pytest.approx((0.7, 0.15))
    (without,) = frontier_points({1.0: [subject("a", image_alignment_masked=None), subject("b")]})
    assert without.image == pytest.approx(0.5)  # whole pictures
    chart = frontier_chart([(p.text, p.image, f"{p.scale:g}") for p in (low, high)])
    assert chart is not None
    (x0, y0, label), (x1, y1, _) = chart.dots
    assert label == "0.5"
    assert x0 > x1  # more text to the right
    assert y0 > y1  # more image is up: smaller y
    width = chart.width - 60  # 12 % of the range is free on both sides
    assert x0 - x1 == pytest.approx(width / 1.24, abs=0.2)
    assert frontier_chart([(0.1, 0.2, "1"), (None, 0.3, "2")]) is None


@pytest.mark.parametrize("scales", [[0.0], [-1.0], [11.0], [float("inf")], ["1"], [0.1] * 21])
def test_wrong_scales(scales: list) -> None:
    with pytest.raises(CatVersionError, match=r"scales: .*must be"):
        check_scales(scales)
    assert check_scales([1, 0.5, 1.0]) == (0.5, 1.0)


def test_help_gives_the_reason_of_every_threshold(capsys) -> None:
    from catversion_jax.cli import main

    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(GateSettings):
        assert re.search(rf"--gate_{field.name} .*?: .*?\[{field.default}\]", shown)
