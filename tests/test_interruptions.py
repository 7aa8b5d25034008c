"""What ends a run before its time: SIGKILL, signals, a file named STOP, damage. It goes on."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from running import (
    arguments,
    assert_close,
    ended,
    final_files,
    run_here,
    run_to_end,
    start,
    steps_of,
    timeline,
    wait_for,
    wait_for_steps,
)

from catversion_jax.cli import main

# ---- killed


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the first process, the oldest first."""
    folders = (output / "checkpoints" / "process-0000").iterdir()
    return sorted((f for f in folders if f.name.isdigit()), key=lambda folder: int(folder.name))


@pytest.fixture(scope="module")
def interrupted(
    one_block_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was killed once two of its three concepts had come to step 8."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    process = start(arguments(one_block_sd_folder, toys, output))
    wait_for(process, "checkpoints/process-0000/8", output)
    process.kill()
    process.communicate()
    assert not final_files(output)
    assert len(checkpoints(output)) >= 2
    return output


def test_killed_damaged_and_killed_again_the_final_files_are_the_same_bytes(
    one_block_sd_folder: Path, toys: Path, interrupted: Path, finished: Path, tmp_path: Path
) -> None:
    output, moment = tmp_path / "out", random.Random(0)
    shutil.copytree(interrupted, output)
    *_, before, newest = checkpoints(output)
    for file in newest.rglob("*"):
        if file.is_file() and os.path.getsize(file) > 200:
            file.write_bytes(file.read_bytes()[:100])
    # The checkpoint before it is used, loudly; then a kill in the steps, the saving or the export.
    process = start(arguments(one_block_sd_folder, toys, output))
    wait_for_steps(process, output, times=moment.randint(1, 3))
    time.sleep(moment.uniform(0, 0.2))
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    code, text = ended(process)
    assert code == -signal.SIGKILL
    assert f"{newest}: is damaged" in text.replace("\n", "")
    assert f"resumed 2 concepts at step {before.name}" in text
    run_to_end(arguments(one_block_sd_folder, toys, output))
    assert final_files(output) == final_files(finished)


@pytest.mark.slow
def test_interrupted_concepts_continue_on_a_smaller_machine(
    one_block_sd_folder: Path, toys: Path, interrupted: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    args = arguments(one_block_sd_folder, toys, output, concepts_per_device=1)
    text = run_to_end(args, JAX_LOG_COMPILES="1")
    assert "resumed 2 concepts at step" in text
    # No matter how often the row is refilled; not once where the executable is kept.
    assert len(re.findall(r"Compiling jit\(train_\w+\)", text)) <= 1
    assert "compiled again" not in text
    assert steps_of(output) == steps_of(finished)
    assert_close(output, finished)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_without_a_concept_that_was_taken_out(
    one_block_sd_folder: Path, toys: Path, interrupted: Path, finished: Path, tmp_path: Path, caplog
) -> None:
    """And on a larger machine: this process has eight devices."""
    concepts, output = tmp_path / "concepts", tmp_path / "out"
    shutil.copytree(interrupted, output)
    shutil.copytree(toys, concepts)
    shutil.rmtree(concepts / "purple_kite")
    assert run_here(one_block_sd_folder, concepts, output) == 0
    assert "resumed 1 concepts at step" in caplog.text
    assert steps_of(output) == {"striped_ball": 12, "teal_cup": 12}
    rows = {line["concept"]: line["row"] for line in timeline(output)}
    assert rows == {"striped_ball": "1", "teal_cup": "0"}  # the former goes on where it was
    assert_close(output, finished, leave_out="purple_kite")


# ---- asked to stop

LONG = {
    "max_train_steps": 400,
    "checkpointing_steps": 1000,
    "eval_steps": 100,
    "logging_steps": 10,
}


@pytest.fixture(scope="module")
def whole(one_block_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_to_end(arguments(one_block_sd_folder, toys, output, **LONG))
    return output


def saved_step(output: Path) -> int:
    """The step of the one checkpoint that a run leaves which was asked to stop."""
    (folder,) = checkpoints(output)[-1:]
    assert int(folder.name) % 1000
    return int(folder.name)


@pytest.mark.slow
def test_signals_and_a_file_named_stop_save_what_is_under_way(
    one_block_sd_folder: Path, toys: Path, whole: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    args = arguments(one_block_sd_folder, toys, output, **LONG)
    process = start(args)
    wait_for(process, "concepts/*/metrics.csv", output)
    shown = ""
    while process.poll() is None and not re.search(r"purple_kite: step [1-9]", shown):
        time.sleep(0.1)
        assert main(["status", str(output)]) == 0
        shown = capsys.readouterr().out
    assert re.search(r"2 running.*purple_kite: step \d+ of 400", shown, re.DOTALL), shown
    # another process is refused while the first one lives
    assert run_here(one_block_sd_folder, toys, output, **LONG) == 2
    assert "another process is training into it" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    code, text = ended(process)
    assert code == 75, text
    step = saved_step(output)
    assert main(["status", str(output)]) == 0
    assert "no process is training here now: run its command again" in capsys.readouterr().out

    # Ctrl-C once is the same, and so is a file named STOP.
    for ask in ("Ctrl-C", "STOP"):
        process = start(args)
        wait_for_steps(process, output, times=4)  # that the files are opened changes them too
        if ask == "STOP":
            (output / "STOP").touch()
        else:
            process.send_signal(signal.SIGINT)
        code, text = ended(process)
        assert code == 75, text
        assert f"resumed 2 concepts at step {step}" in text
        assert "The same command goes on." in text
        assert saved_step(output) > step
        step = saved_step(output)

    # Ctrl-C twice does not wait for anything, and damages nothing.
    process = start(args)
    wait_for_steps(process, output)
    process.send_signal(signal.SIGINT)
    text = first_lines(process, "SIGINT: saving what is under way")
    process.send_signal(signal.SIGINT)
    code, rest = ended(process)
    assert code == 130, text + rest
    assert "interrupted; finished files are kept. Run the same command again." in rest

    run_to_end(args)
    assert final_files(output) == final_files(whole)
    assert main(["status", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 3}


def first_lines(process: subprocess.Popen, last: str) -> str:
    """What it prints up to a line with these words; a progress bar may stand before them."""
    text = ""
    for line in process.stdout:
        text += line
        if last in line:
            break
    return text
