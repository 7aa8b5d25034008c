"""The study's arms, statistics, outside baseline (against diffusers), and that it resumes."""

import dataclasses
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import UNet2DConditionModel
from random_model import write_random_model, write_toy_concepts
from tiny_pipelines import save_clip

from catversion_jax.concepts import read_concepts
from catversion_jax.config import TrainConfig, make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import load_backbone

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "study"))

import analyses
import arms
import comparison
import goals
import page
import run
from dreambooth import DreamBooth, Settings
from fine_tuned import backbone_with
from study import evenly_spread

ROOT = Path(__file__).resolve().parents[1]

# ---- the table of arms


def test_every_arm_is_a_configuration_the_trainer_accepts():
    table = arms.make_arms(6)
    for arm in table.values():
        if arm.kind == "trainer":
            make_config({**arms.SHARED, **arm.options, "concepts": "x"})
        elif arm.kind == "dreambooth":
            Settings(**arm.options)
    assert {arm.question for arm in table.values()} <= set(arms.QUESTIONS)
    assert len({arm.name.lower() for arm in table.values()}) == len(table)
    assert all(arms.base_of(arm.question) in table for arm in table.values())
    assert {f"layers={layer}" for layer in range(6)} <= set(table)


def test_an_ablation_changes_one_option():
    for arm in arms.make_arms(6).values():
        if arm.question in {"layers", *arms.VARIED}:
            before, after = (
                dataclasses.asdict(make_config({"concepts": "x", **options}))
                for options in (arms.OURS, arm.options)
            )
            assert [k for k in before if before[k] != after[k]] == [arm.question]


def test_what_ours_leaves_open_is_the_trainers_default():
    defaults = dataclasses.asdict(TrainConfig(concepts="x"))
    assert {key: defaults[key] for key in arms.OTHERWISE} == arms.OTHERWISE


def test_only_chooses_arms_and_questions():
    def names(only):
        return [arm.name for arm in run.chosen_arms(only, 6)]

    assert names("init=zero,dreambooth") == ["dreambooth", "init=zero"]
    assert names("dreambooth,learning_rate=1e-05") == ["dreambooth,learning_rate=1e-05"]
    assert "none" in names("methods")
    assert len(names("scope")) == 2
    with pytest.raises(CatVersionError, match=r"--only wrong: no such arm or question"):
        run.chosen_arms("scope,wrong", 6)


# ---- statistics


def record(image, text, drift, other_identical):
    scores = {
        "images": 4,
        "image_alignment": image,
        "image_alignment_masked": image,
        "text_alignment_edit": text,
        "text_alignment_prompt": text,
        "overall": np.sqrt(image * text),
        "overall_masked": np.sqrt(image * text),
        "dino_masked": image - 0.02,
        "nearest_reference": image,
        "copies": 1,
        "masks": 4,
        "empty_masks": 0,
    }
    real = {"image_alignment_masked": 0.8, "image_alignment": 0.9}
    prior = {"drift": drift, "other_identical": other_identical, "class_kept": 0.5}
    return {"total": scores, "first_seed": scores, "real": real, "prior": prior}


def content(base, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    concepts = {
        f"c{i}": record(value + shift, 0.3, 0.2, shift == 0.0)
        for i, value in enumerate(rng.uniform(0.3, 0.6, 20).tolist())
    }
    return {"base": base, "question": "methods", "concepts": concepts}


def test_means_and_paired_differences_are_scipys_bootstrap():
    found = comparison.compare({"a": content("catversion", 0), "none": content("catversion", 1)})
    values = [
        np.array([r["total"]["image_alignment"] for r in content("", s)["concepts"].values()])
        for s in (0, 1)
    ]
    ours = found["a"]["total"]
    for numbers, got in (
        (values[0], ours["mean"]["image_alignment"]),
        (values[0] - values[1], ours["against"]["none"]["image_alignment"]),
    ):
        scipys = scipy.stats.bootstrap(
            (numbers,), np.mean, method="percentile", n_resamples=20_000, rng=3
        ).confidence_interval
        assert got["mean"] == pytest.approx(numbers.mean(), abs=1e-12)
        np.testing.assert_allclose([got["low"], got["high"]], [*scipys], atol=3e-3)
    assert ours["concepts"] == 20


def test_a_constant_shift_has_an_interval_of_no_width():
    """Paired: a hard concept does not blur a difference."""
    found = comparison.compare({"a": content("none", 0, shift=0.1), "none": content("none", 0)})
    got = found["a"]["total"]["against"]["none"]["image_alignment"]
    assert [got["low"], got["high"]] == pytest.approx([0.1, 0.1])
    share = found["a"]["total"]["against"]["none"][comparison.CEILING]
    assert share["mean"] == pytest.approx(0.1 / 0.8)


def test_drift_as_used_is_zero_only_where_images_were_identical():
    assert comparison.concept_figures(record(0.5, 0.3, 0.2, True), "total")["drift_as_used"] == 0
    used = comparison.concept_figures(record(0.5, 0.3, 0.2, None), "total")
    assert used["drift_as_used"] == used["drift_forced"] == 0.2
    assert used["copied"] == 0.25


def test_one_concept_has_no_interval():
    found = comparison.plain(comparison.means({"c": {"overall": 0.5}}))
    assert found == {"overall": {"mean": 0.5, "low": None, "high": None}}


def test_goals_hold_and_fail_by_their_thresholds():
    def arm(overall, drift, samples=800):
        figure = {"mean": overall, "low": overall - 0.01, "high": overall + 0.01}
        spread = {"mean": drift, "low": drift, "high": drift}
        mean = {"overall_masked": figure, "share_of_ceiling_masked": figure, "drift_forced": spread}
        against = {"none": {"text_alignment_edit": {"mean": -0.06, "low": -0.07, "high": -0.05}}}
        compute = {"samples_per_concept": samples}
        return {"text": "X", "total": {"mean": mean, "against": against}, "compute": compute}

    unpreserved = {"catversion": arm(0.86, 0.1), "dreambooth": arm(0.841, 0.31, 400)}
    rows = goals.goals(unpreserved, "catversion")
    # intervals touch; more samples; 0.86 of the ceiling; 0.06 of text lost; a third of the drift
    assert [holds for _, _, holds in rows] == [False, False, True, False, True]
    assert rows[0][1] == "0.860 [0.850, 0.870] and 0.841 [0.831, 0.851]"
    assert goals.goals({"dreambooth": arm(0.5, 0.1)}, "catversion") == []
    # held against the others with the same loss
    preserving = {"longer_context": arm(0.86, 0.1), "dreambooth_preserving": arm(0.841, 0.31, 400)}
    assert goals.goals({**unpreserved, **preserving}, "longer_context") == rows
    preserving["longer_context"] = arm(0.9, 0.1)
    assert goals.goals({**unpreserved, **preserving}, "catversion") == rows


# ---- analyses


def test_class_share_is_one_where_only_the_class_speaks_and_zero_where_only_the_prompt_does():
    rng = np.random.default_rng(0)
    per_class, per_prompt = rng.normal(size=(5, 1, 7)), rng.normal(size=(1, 4, 7))
    per_class = per_class - per_class.mean(axis=0)
    only_class = np.broadcast_to(per_class, (5, 4, 7))
    np.testing.assert_allclose(analyses.class_share(only_class), 1)
    only_prompt = np.broadcast_to(per_prompt, (5, 4, 7))
    np.testing.assert_allclose(analyses.class_share(only_prompt), 0, atol=1e-12)
    both = analyses.class_share(only_class + only_prompt)
    common = np.square(per_class).sum(axis=(1, 2))
    spread = np.square(per_prompt - per_prompt.mean(axis=1, keepdims=True)).sum() / 4
    np.testing.assert_allclose(both, common / (common + spread))


def test_token_roles():
    ids = np.array([[90, 1, 5, 6, 2, 91, 91, 91], [90, 5, 6, 91, 0, 0, 0, 0]])
    word_places = np.array([[-1, -1, 0, 1, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1]])
    roles = [
        [analyses.ROLES[i][:3] for i in row] for row in analyses.token_roles(ids, word_places, 91)
    ]
    assert roles[0] == ["sta", "bef", "cla", "cla", "aft", "end", "pad", "pad"]
    assert roles[1] == ["sta", "cla", "cla", "end", "pad", "pad", "pad", "pad"]


# ---- the page that is published


def test_the_published_page_says_what_the_kept_results_say(tmp_path):
    with tarfile.open(ROOT / "tools" / "study" / "study.tar.xz") as kept:
        kept.extractall(tmp_path, filter="data")
    out, named = str(tmp_path / "study"), str(tmp_path / "study-named")
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    assert page.main([out, "--named", named, "--docs", str(tmp_path / "docs")]) == 0
    made = (tmp_path / "docs" / "results" / "study.md").read_text(encoding="utf-8")
    assert made == (ROOT / "docs" / "results" / "study.md").read_text(encoding="utf-8")


# ---- the whole of it, small


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_random_model(root / "model")
    write_toy_concepts(root / "concepts")
    save_clip(root / "model" / "clip", root / "model" / "tokenizer")
    (root / "prompts.txt").write_text("a {} in the snow")
    return root


def study(world, only, *more):
    options = {
        "--model": world / "model",
        "--concepts": world / "concepts",
        "--prompts": world / "prompts.txt",
        "--dino": "tiny-sd-judge",
        "--only": only,
        "--compilation_cache": world / "cache",
    }
    sizes = ["--seeds", "2", "--max_concepts", "2", "--train_steps", "2"]
    sizes += ["--num_inference_steps", "1", "--num_prior_images", "1"]
    words = [str(word) for pair in options.items() for word in pair]
    return run.main([str(world / "out"), *words, *sizes, *map(str, more)])


@pytest.mark.slow
def test_the_study_runs_resumes_and_writes_its_page(world, capsys):
    assert study(world, "none,dreambooth,catversion") == 0
    kept = {p: p.stat().st_mtime_ns for p in (world / "out" / "arms").rglob("*") if p.is_file()}
    lost = world / "out" / "arms" / "none" / "scores.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert study(world, "none") == 0
    assert json.loads(lost.read_text())["concepts"] == before["concepts"]
    assert {p for p, t in kept.items() if p.stat().st_mtime_ns != t} <= {
        lost,
        lost.with_name("training.json"),
    }
    results = json.loads((world / "out" / "results.json").read_text())
    assert set(results["arms"]) == {"none", "dreambooth", "catversion"}
    ours = results["arms"]["catversion"]
    assert ours["compute"]["samples_per_concept"] == 2 * 2
    assert ours["total"]["mean"]["drift_as_used"]["high"] == 0
    assert set(ours["total"]["against"]) == {"none", "dreambooth"}
    out = str(world / "out")
    assert page.main([out, "--named", out, "--docs", str(world / "docs")]) == 0
    text = (world / "docs" / "results" / "study.md").read_text()
    for label in ("CatVersion, preset=fast", page.NAMED_ROW):
        row = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
        assert row.count("[") == len(page.METHOD_COLUMNS)  # no figure without its interval
    for link in (world / "docs" / "images").glob("*.png"):
        assert f"(../images/{link.name})" in text
    # the results alone make the same page again
    (world / "kept").mkdir()
    for name in ("results.json", "analyses.json"):
        shutil.copy(world / "out" / name, world / "kept")
    kept = str(world / "kept")
    assert page.main([kept, "--named", out, "--docs", str(world / "docs")]) == 0
    assert (world / "docs" / "results" / "study.md").read_text() == text
    # another training under the same name is refused, with the remedy
    assert study(world, "none", "--train_steps", "3") == 2
    assert "was trained with other train_steps. Remove this folder" in capsys.readouterr().err


@pytest.mark.slow
def test_dreambooth_moves_every_part_and_is_drawn_as_torch_computes_it(world):
    spec = read_concepts(world / "concepts").concepts[0]
    method = DreamBooth(str(world / "model"), 64)
    settings = Settings(learning_rate=1e-3, steps=2, batch_size=2)
    tuned = method.fine_tune(spec, "a ball", settings)
    again = method.fine_tune(spec, "a ball", settings)
    plain = UNet2DConditionModel.from_pretrained(world / "model", subfolder="unet")
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert not torch.equal(value, plain.state_dict()[name]), name
    backbone = load_backbone(world / "model")
    ours = backbone_with(backbone, tuned, "tuned")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 16, 16, 4)).astype(np.float32)
    text = rng.normal(size=(1, 8, 64)).astype(np.float32)
    with torch.no_grad():
        given = torch.from_numpy(x).permute(0, 3, 1, 2), 7, torch.from_numpy(text)
        expected = tuned.cpu()(*given).sample.permute(0, 2, 3, 1).numpy()
    got = np.asarray(ours.unet(x, np.array([7]), text))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert ours.name != backbone.name
    # preserving: the plain model loses nothing outside the mask, and the usual loss inside it
    clean, states = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(text)

    def loss(mask: torch.Tensor, weight: float) -> float:
        torch.manual_seed(0)
        return method._loss(
            plain, clean, mask, states, dataclasses.replace(settings, preserve_weight=weight)
        ).item()

    mask = torch.zeros(1, 1, 16, 16)
    assert loss(mask, 1.0) == 0
    assert loss(mask + 1, 1.0) == pytest.approx(loss(mask, 0.0))


def test_a_part_of_the_concepts_is_spread_evenly(world):
    concepts = read_concepts(world / "concepts")
    names = [spec.name for spec in evenly_spread(concepts, 2).concepts]
    assert names == [concepts.concepts[0].name, concepts.concepts[1].name]
    with pytest.raises(CatVersionError, match=r"1 concepts: must be within 2\.\.3"):
        evenly_spread(concepts, 1)
