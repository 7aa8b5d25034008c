"""``python train_tpu.py`` from the outside: what it writes, quarantine, exit codes."""

import csv
import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from running import final_files, metrics, run_here, steps_of
from safetensors import safe_open
from tiny_pipelines import save_clip

from catversion_jax import load_concept


def test_a_run_writes_what_the_readme_says(finished: Path, toys: Path) -> None:
    assert sorted(final_files(finished)) == ["purple_kite", "striped_ball", "teal_cup"]
    folder = finished / "concepts" / "purple_kite"
    with safe_open(folder / "catversion.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {  # noqa: SIM118
            f"layers.{layer}.{part}": (1, 4, 8) for layer in (1, 2, 3) for part in ("key", "value")
        }
    assert metadata["format"] == "pt"
    assert metadata["catversion.base_class"] == "kite"
    assert metadata["catversion.step"] == "12"
    assert json.loads(metadata["catversion.images"]) == ["1.png", "2.png", "3.png", "4.png"]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4", "6", "8", "10", "12"]
    assert [bool(row["eval_loss"]) for row in rows] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert all(np.isfinite(float(row["loss"])) for row in rows[1:])
    with (finished / "index.csv").open() as file:
        index = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: row["state"] for name, row in index.items()} == dict.fromkeys(
        ("purple_kite", "striped_ball", "teal_cup"), "done"
    )
    assert index["purple_kite"]["eval_loss"] == rows[-1]["eval_loss"]
    assert float(index["purple_kite"]["plain_eval_loss"]) > 0
    assert (finished / "run.json").exists()
    assert (finished / "config.resolved.yaml").exists()
    assert (folder / "catversion-000004.safetensors").exists()
    with Image.open(folder / "samples" / "000012.png") as grid:
        assert json.loads(grid.info["parameters"])["concept"] == "purple_kite"
        assert grid.width > 3 * 128  # references and two prompts


def test_a_run_is_scored_by_the_clip_that_it_names(
    finished: Path, toys: Path, one_block_sd_folder: Path, tmp_path: Path, capsys
) -> None:
    """The model has none of its own; that is said before anything is trained."""
    new, done, clip = (tmp_path / name for name in ("new", "done", "clip"))
    shutil.copytree(finished, done)
    save_clip(clip, one_block_sd_folder / "tokenizer")
    (tmp_path / "prompts.txt").write_text("a {} in the snow")
    options = {
        "evaluate_after": True,
        "evaluation_prompts": tmp_path / "prompts.txt",
        "validation_inference_steps": 2,
    }
    assert run_here(one_block_sd_folder, toys, new, **options) == 2
    assert "has no clip/ folder of its own to score with" in capsys.readouterr().err
    assert run_here(one_block_sd_folder, toys, new, evaluation_clip=toys, **options) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert not new.exists()
    assert run_here(one_block_sd_folder, toys, done, evaluation_clip=clip, **options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(done / "report.html")
    assert "in the snow" in (done / "report.html").read_text()


def test_tensorboard_holds_the_losses_of_the_csv(finished: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (finished / "logs" / "teal_cup").glob("events.*")
    data, scalars = path.read_bytes(), {}
    while data:  # a TFRecord: length, its checksum, the message, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    with (finished / "concepts" / "teal_cup" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[1:]:
        assert scalars["loss/train", int(row["step"])] == pytest.approx(
            float(row["loss"]), rel=1e-4
        )
    assert scalars["loss/eval", 12] == pytest.approx(float(rows[-1]["eval_loss"]), rel=1e-4)


def test_a_finished_run_is_recognised(
    one_block_sd_folder: Path, toys: Path, finished: Path
) -> None:
    before = stamps(finished)
    assert run_here(one_block_sd_folder, toys, finished) == 0
    assert stamps(finished) == before


def test_a_run_with_other_options_is_not_continued(
    one_block_sd_folder: Path, toys: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(one_block_sd_folder, toys, finished, learning_rate=0.5) == 2
    message = capsys.readouterr().err
    assert "learning_rate: 0.01 -> 0.5" in message
    assert "another output_dir" in message
    assert run_here(one_block_sd_folder, toys, finished, resume_from_checkpoint="none") == 2
    assert "would overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_bfloat16_learns_nearly_the_same_and_null_asks_for_no_cache_of_our_own(
    one_block_sd_folder: Path,
    toys: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    before = jax.config.values["jax_compilation_cache_dir"]
    output = tmp_path / "out"
    options = {"mixed_precision": "bf16", "compilation_cache_dir": "null", "max_train_steps": 4}
    assert run_here(one_block_sd_folder, toys, output, **options) == 0
    assert jax.config.values["jax_compilation_cache_dir"] == before
    assert not (tmp_path / "home").exists()
    for name in final_files(finished):
        whole, half = (metrics(run / "concepts" / name)[:3] for run in (finished, output))
        for kind in ("loss", "eval_loss"):
            exact = [float(row[kind]) for row in whole if row[kind]]
            rounded = [float(row[kind]) for row in half if row[kind]][: len(exact)]
            assert rounded == pytest.approx(exact, rel=0.03)  # 8 bits: 0.4 % a number
            assert rounded != pytest.approx(exact, rel=1e-5)
        concept = load_concept(output / "concepts" / name)
        assert concept.learned.key.dtype == np.float32  # what is learned stays float32
        assert concept.train_config["mixed_precision"] == "bf16"


# ---- one folder, from a mistyped first attempt to more steps and more concepts


@pytest.fixture(scope="module")
def broken(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two concepts; an image of one of them is cut short."""
    concepts = tmp_path_factory.mktemp("broken") / "concepts"
    for name in ("striped_ball", "purple_kite"):
        shutil.copytree(toys / name, concepts / name)
    photo = concepts / "striped_ball" / "2.png"
    photo.write_bytes(photo.read_bytes()[:200])
    return concepts


def stamps(output: Path) -> dict[Path, int]:
    files = output.glob("concepts/*/catversion.safetensors")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_folder_from_the_first_mistake_to_more_steps_and_concepts(
    one_block_sd_folder: Path, toys: Path, broken: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    # A mistyped first attempt does not pin the folder.
    assert run_here(one_block_sd_folder, broken, output, layers="last9") == 2
    assert "this encoder has 4 layers" in capsys.readouterr().err

    # One unreadable image quarantines its concept only.
    short = {"max_train_steps": 2, "validation_steps": 1, "validation_prompt": "null"}
    assert run_here(one_block_sd_folder, broken, output, **short) == 3
    captured = capsys.readouterr()
    assert "1 concept in" in captured.out
    assert "striped_ball" in captured.err
    assert steps_of(output) == {"purple_kite": 2}
    failed = output / "concepts" / "striped_ball" / "FAILED.txt"
    assert "2.png" in failed.read_text()
    assert not list(output.glob("concepts/*/samples"))  # no prompt, no pictures

    # The photo is replaced, the command repeated: only this concept is trained.
    Image.new("RGB", (64, 64), "red").save(broken / "striped_ball" / "2.png")
    before = stamps(output)
    assert run_here(one_block_sd_folder, broken, output, **short) == 0
    assert steps_of(output) == {"purple_kite": 2, "striped_ball": 2}
    assert before == {path: stamps(output)[path] for path in before}
    assert not failed.exists()

    # More steps and more concepts are welcome, fewer steps are not.
    shutil.copytree(toys / "teal_cup", broken / "teal_cup")
    assert run_here(one_block_sd_folder, broken, output, **{**short, "max_train_steps": 4}) == 0
    assert steps_of(output) == dict.fromkeys(("purple_kite", "striped_ball", "teal_cup"), 4)
    capsys.readouterr()
    assert run_here(one_block_sd_folder, broken, output, **{**short, "max_train_steps": 3}) == 2
    assert "max_train_steps: 4 -> 3" in capsys.readouterr().err
