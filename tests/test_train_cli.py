"""``python train_tpu.py`` from the outside: output, slots, SIGKILL, quarantine, exit codes."""

import csv
import json
import random
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_model import write_toy_concepts
from running import arguments, assert_close, final_files, run_to_end, start
from safetensors import safe_open

from catversion_jax import load_concept
from catversion_jax.cli import main


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three concepts of four images: with two slots, one of them is refilled."""
    folder = tmp_path_factory.mktemp("toys")
    write_toy_concepts(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, with a grid and TensorBoard."""
    output = tmp_path_factory.mktemp("run") / "out"
    shown = {"validation_steps": 12, "validation_inference_steps": 2, "num_validation_images": 1}
    run_to_end(arguments(tiny_sd_folder, toys, output, **shown, report_to="tensorboard"))
    return output


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


def test_killed_at_random_moments_the_final_files_are_the_same_bytes(
    tiny_sd_folder: Path, toys: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    rng = random.Random(0)
    kills = 0
    for _ in range(20):
        process = start(arguments(tiny_sd_folder, toys, output))
        # Wait until it is past loading; then kill it somewhere in the steps, the saving or the
        # export.
        before = sorted(output.glob("concepts/*/metrics.csv"))
        marks = {path: path.stat().st_mtime_ns for path in before}
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            now = {
                p: p.stat().st_mtime_ns for p in output.glob("concepts/*/metrics.csv") if p.exists()
            }
            if any(marks.get(path) != stamp for path, stamp in now.items()):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        if process.poll() is None and kills < 2:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.communicate()
            continue
        text, _ = process.communicate(timeout=400)
        assert process.returncode == 0, text
        break
    assert kills >= 1
    assert final_files(output) == final_files(finished)


@pytest.fixture(scope="module")
def interrupted(tiny_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed once two of its three concepts had come to step 8."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    process = start(arguments(tiny_sd_folder, toys, output))
    while process.poll() is None and not list(output.glob("checkpoints/process-0000/8")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not final_files(output)
    return output


def test_interrupted_concepts_continue_on_a_smaller_machine(
    tiny_sd_folder: Path, toys: Path, interrupted: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    args = arguments(tiny_sd_folder, toys, output, concepts_per_device=1)
    text = run_to_end(args, JAX_LOG_COMPILES="1")
    assert "resumed 2 concepts at step" in text
    assert text.count("Compiling jit(many_steps)") == 1  # no matter how often the slot is refilled
    assert_close(output, finished)


def test_an_interrupted_run_goes_on_without_a_concept_that_was_taken_out(
    tiny_sd_folder: Path, toys: Path, interrupted: Path, tmp_path: Path
) -> None:
    concepts, output = tmp_path / "concepts", tmp_path / "out"
    shutil.copytree(interrupted, output)
    shutil.copytree(toys, concepts)
    shutil.rmtree(concepts / "purple_kite")
    text = run_to_end(arguments(tiny_sd_folder, concepts, output))
    assert "resumed 1 concepts at step" in text
    assert sorted(final_files(output)) == ["striped_ball", "teal_cup"]


def test_a_finished_run_is_recognised(tiny_sd_folder: Path, toys: Path, finished: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in finished.glob("concepts/*/catversion.safetensors")
    }
    assert main(["train", *arguments(tiny_sd_folder, toys, finished)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_one_unreadable_image_quarantines_its_concept_only(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    concepts, output = tmp_path / "concepts", tmp_path / "out"
    write_toy_concepts(concepts)
    broken = concepts / "striped_ball" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    process = start(arguments(tiny_sd_folder, concepts, output))
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 3, text
    assert "striped_ball" in text
    assert sorted(final_files(output)) == ["purple_kite", "teal_cup"]
    reason = (output / "concepts" / "striped_ball" / "FAILED.txt").read_text()
    assert "2.png" in reason
    # The photo is replaced, the command repeated: only this concept is trained.
    Image.new("RGB", (64, 64), "red").save(broken)
    done = {
        path: path.stat().st_mtime_ns for path in output.glob("concepts/*/catversion.safetensors")
    }
    run_to_end(arguments(tiny_sd_folder, concepts, output))
    assert len(final_files(output)) == 3
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert not (output / "concepts" / "striped_ball" / "FAILED.txt").exists()


def test_a_loss_that_is_not_finite_quarantines_and_keeps_the_last_finite_state(
    tiny_sd_folder: Path, toys: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert main(["train", *arguments(tiny_sd_folder, toys, output, learning_rate=1e38)]) == 3
    assert not final_files(output)
    folder = output / "concepts" / "teal_cup"
    assert "not finite at step" in (folder / "FAILED.txt").read_text()
    kept = load_concept(next(folder.glob("catversion-*.safetensors")))
    assert np.isfinite(kept.learned.key).all()


def test_a_run_with_other_options_is_not_continued(
    tiny_sd_folder: Path, toys: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments(tiny_sd_folder, toys, finished, learning_rate=0.5)]) == 2
    message = capsys.readouterr().err
    assert "learning_rate: 0.01 -> 0.5" in message
    assert "another output_dir" in message
    assert (
        main(["train", *arguments(tiny_sd_folder, toys, finished, resume_from_checkpoint="none")])
        == 2
    )
    assert "would overwrite" in capsys.readouterr().err


def test_a_mistyped_first_attempt_does_not_pin_the_folder(
    tiny_sd_folder: Path, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["train", *arguments(tiny_sd_folder, toys, output, layers="last9")]) == 2
    assert "this encoder has 4 layers" in capsys.readouterr().err
    short = {"max_train_steps": 2, "validation_steps": 1, "validation_prompt": "null"}
    assert main(["train", *arguments(tiny_sd_folder, toys, output, **short)]) == 0
    assert len(final_files(output)) == 3
