"""SIGKILL again and again at random moments: the run ends with the same bytes all the same."""

import csv
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from random_model import write_toy_concepts
from running import arguments, final_files, start

NUM_CONCEPTS, NUM_KILLS = 50, 20
OPTIONS = {"max_train_steps": 100, "checkpointing_steps": 5, "concepts_per_device": 4}


@pytest.mark.slow
def test_twenty_kills_in_a_run_of_fifty_concepts(one_block_sd_folder: Path, tmp_path: Path) -> None:
    concepts, whole, output = (tmp_path / name for name in ("concepts", "whole", "out"))
    _write_concepts(concepts)
    process = start(arguments(one_block_sd_folder, concepts, whole, **OPTIONS))
    startup = _seconds_until_work(process, whole)
    began = time.monotonic()
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    work = time.monotonic() - began

    moments, finished = random.Random(0), dict[Path, int]()
    for kill in range(NUM_KILLS):
        process = start(arguments(one_block_sd_folder, concepts, output, **OPTIONS))
        if kill % 5 == 4:  # now and then while it starts
            time.sleep(moments.uniform(0.1, 0.5) * startup)
        else:
            _seconds_until_work(process, output)
            time.sleep(moments.uniform(0.0, 1.2) * work / NUM_KILLS)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        files = output.glob("concepts/*/catversion.safetensors")
        now = {path: path.stat().st_mtime_ns for path in files}
        assert {path: now[path] for path in finished} == finished  # none was done again
        finished = now
    assert 0 < len(finished) < NUM_CONCEPTS
    process = start(arguments(one_block_sd_folder, concepts, output, **OPTIONS))
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    assert final_files(output) == final_files(whole)
    with (output / "index.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["done"] * NUM_CONCEPTS


def _seconds_until_work(process: subprocess.Popen, output: Path) -> float:
    """Until the first steps are done."""
    began, clock = time.monotonic(), time.time()
    while process.poll() is None and not any(
        path.stat().st_mtime > clock for path in output.glob("concepts/*/*.safetensors")
    ):
        time.sleep(0.05)
    return time.monotonic() - began


def _write_concepts(folder: Path) -> None:
    """The three toys again and again, each with a seed of its own."""
    write_toy_concepts(folder)
    toys = sorted(folder.iterdir())
    for number in range(len(toys), NUM_CONCEPTS):
        copy = folder / f"{number:02d}_{toys[number % len(toys)].name}"
        shutil.copytree(toys[number % len(toys)], copy)
        described = json.loads((copy / "concept.json").read_text())
        (copy / "concept.json").write_text(json.dumps({**described, "seed": number}))
