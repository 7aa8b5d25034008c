"""Whatever lies in the place of a run's small files: the run goes on, and everything reads it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import assert_close, final_files, metrics, run_here, timeline

from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import load_concept
from catversion_jax.training.run.index import REASON_LENGTH, index_of_folders, one_line, read_index
from catversion_jax.training.run.metrics import read_evaluations
from catversion_jax.training.run.reader import (
    read_trained_concept,
    recorded_concepts,
    recorded_model,
)
from catversion_jax.training.run.status import read_status
from catversion_jax.training.run.summary import read_summary, restored_summary

OF_RUN = ("run.json", "index.csv", "timeline.csv", "metrics.jsonl", "config.resolved.yaml")
OF_CONCEPT = ("metrics.csv", "metrics.json", "FAILED.txt")


def content(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda path: path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "empty": content(""),
    "garbage": content(bytes(range(256)) * 9),
    "nul": content("\x00" * 5000),
    "folder": lambda path: (path.mkdir(), (path / "inside").write_text("x")),
    "pipe": lambda path: os.mkfifo(path),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "list": content("[1, 2, [3]]"),
    "deep": content("[" * 100_000),
    "digits": content('{"eval_loss": 1' + "0" * 5000 + "}"),
    "types": content(
        json.dumps(
            {
                "base_model": [1],
                "text_encoder_sha256": {},
                "digests": [],
                "options": {"max_train_steps": "many"},
                "concepts": 7,
                "eval_loss": "low",
                "plain_eval_loss": None,
                "stopped_early": [3],
                "concepts_per_hour": {},
            }
        )
    ),
    "rows": content("name,state\n,\n=x,flying,1,2,3\nstep,loss\n\u00b2,x,y\n1e400,inf,nan\n"),
    "long": content("name,state,reason\nrex,done," + "x" * 200_000 + "\n"),
}


def replace(path: Path, damage: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    DAMAGES[damage](path)


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*OF_RUN, *OF_CONCEPT])
def test_every_reader_reads_anything(output: Path, name: str, damage: str, capsys) -> None:
    """One file at a time; a pipe would keep a reader waiting forever."""
    folder = output / "concepts" / "teal_cup"
    replace((folder if name in OF_CONCEPT else output) / name, damage)
    found = read_status(output)
    assert sum(found["counts"].values()) >= 1
    assert main(["status", str(output)]) == 0
    assert main(["status", str(output), "--json"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert recorded_model(output) is None or recorded_model(output)
    trained = read_trained_concept(output, "teal_cup")
    assert trained.state in ("done", "stopped early")
    assert all(isinstance(loss, float) for _, loss in trained.losses)
    if name == "config.resolved.yaml":
        with pytest.raises(CatVersionError, match="--concepts"):
            recorded_concepts(output)
    else:
        assert len(recorded_concepts(output).concepts) == 3


@pytest.mark.parametrize(
    "damage",
    [
        damage
        if damage in ("nothing", "garbage", "folder", "pipe", "types")
        else pytest.param(damage, marks=pytest.mark.slow)
        for damage in DAMAGES
    ],
)
def test_a_finished_run_is_recognised_whatever_became_of_its_small_files(
    one_block_sd_folder: Path, toys: Path, output: Path, damage: str, capsys
) -> None:
    """All files at once: nothing is trained again, and what can be known is written again."""
    before, kept = final_files(output), read_index(output / "index.csv")
    for name in OF_RUN:
        replace(output / name, damage)
    for folder in (output / "concepts").iterdir():
        for name in OF_CONCEPT:
            replace(folder / name, damage)
    for name in ("STOP", "process-0000.lock"):
        replace(output / name, "folder" if damage == "folder" else "nothing")
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("concepts/*/*.safetensors")}
    assert run_here(one_block_sd_folder, toys, output) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert final_files(output) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    now = read_index(output / "index.csv")
    assert [(r["name"], r["state"], r["file"]) for r in now] == [
        (r["name"], r["state"], r["file"]) for r in kept
    ]
    assert read_status(output)["max_train_steps"] == 12
    assert recorded_model(output) == str(one_block_sd_folder)
    assert timeline(output) == []  # begun again, with its header
    assert len(recorded_concepts(output).concepts) == 3


@pytest.mark.slow
def test_what_a_checkpoint_knows_is_written_again(
    one_block_sd_folder: Path, toys: Path, output: Path, finished: Path
) -> None:
    """A run that goes on from its checkpoints without the losses of its first steps."""
    for folder in (output / "concepts").iterdir():
        (folder / "catversion.safetensors").unlink()
        replace(folder / "metrics.csv", "garbage")
        replace(folder / "metrics.json", "folder")
        replace(folder / "samples", "empty")
    for name in ("logs", "STOP"):
        replace(output / name, "empty")
    assert run_here(one_block_sd_folder, toys, output, validation_steps=12) == 0
    assert_close(output, finished)
    for folder in (output / "concepts").iterdir():
        name = folder.name
        written = {row["step"]: row["eval_loss"] for row in metrics(folder) if row["eval_loss"]}
        whole = metrics(finished / "concepts" / name)
        assert list(written) == [row["step"] for row in whole if row["eval_loss"]]
        assert written["6"] == next(row["eval_loss"] for row in whole if row["step"] == "6")
        assert set(read_summary(folder)) == {"eval_loss", "plain_eval_loss"}
        drawn = (folder / "samples.damaged").is_file()  # not of one that was at its last step
        assert drawn == (folder / "samples" / "000012.png").is_file()
        assert (folder / "metrics.json.damaged").is_dir()


def test_a_lost_summary_still_tells_that_a_concept_was_stopped_early(output: Path) -> None:
    folder = output / "concepts" / "teal_cup"
    concept = load_concept(folder)
    concept.train_config["max_train_steps"] = 30
    (folder / "metrics.json").write_text('{"eval_loss": ')
    found = restored_summary(folder, concept)
    losses = dict(read_evaluations(folder / "metrics.csv"))
    assert found == {"eval_loss": losses[12], "stopped_early": 12}
    assert read_summary(folder) == found


def test_a_lost_index_is_read_off_the_folders(output: Path) -> None:
    (output / "concepts" / "teal_cup" / "FAILED.txt").write_text("a reason\nand more")
    (output / "concepts" / "odd").mkdir()
    (output / "concepts" / "purple_kite" / "catversion.safetensors").unlink()
    states = {row["name"]: (row["state"], row["reason"]) for row in index_of_folders(output)}
    assert states == {
        "odd": ("queued", ""),
        "purple_kite": ("running", ""),
        "striped_ball": ("done", ""),
        "teal_cup": ("quarantined", "a reason"),
    }


@pytest.mark.parametrize("line", ["\n", "\r", "\u2028", "x" * 300])
def test_a_reason_of_five_thousand_lines_is_one_line(output: Path, line: str, capsys) -> None:
    reason = f"first line{line}" * 5000
    assert len(one_line(reason)) <= REASON_LENGTH
    assert one_line(reason).startswith("first line")
    (output / "concepts" / "teal_cup" / "FAILED.txt").write_text(reason)
    (output / "index.csv").unlink()
    assert main(["status", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "teal_cup: quarantined: first line" in shown
    assert len(shown) < 1500


@pytest.mark.parametrize("kind", ["pipe", "empty", "nothing"])
def test_status_of_what_is_no_run(tmp_path: Path, kind: str, capsys) -> None:
    replace(tmp_path / "x", kind)
    assert main(["status", str(tmp_path / "x")]) == 2
    assert "is not a training run" in capsys.readouterr().err


def test_a_file_where_the_checkpoints_belong(
    one_block_sd_folder: Path, toys: Path, output: Path, finished: Path
) -> None:
    shutil.rmtree(output / "checkpoints")
    (output / "checkpoints").write_text("in the way")
    (output / "concepts" / "teal_cup" / "catversion.safetensors").unlink()
    assert run_here(one_block_sd_folder, toys, output) == 0
    assert_close(output, finished)


def test_a_pipe_in_the_place_of_a_concept_file(output: Path, capsys) -> None:
    """It would keep whoever reads all concepts of a run waiting."""
    replace(output / "concepts" / "teal_cup" / "catversion.safetensors", "pipe")
    assert main(["inspect", str(output)]) == 2
    assert "teal_cup/catversion.safetensors: " in capsys.readouterr().err
