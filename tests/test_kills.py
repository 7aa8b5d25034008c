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
from test_train_cli import arguments, final_files, start

NUM_CONCEPTS, NUM_KILLS = 50, 20
OPTIONS = {"max_train_steps": 200, "checkpointing_steps": 5, "concepts_per_device": 4}


@pytest.mark.slow
def test_twenty_kills_in_a_run_of_fifty_concepts(tiny_sd_folder: Path, tmp_path: Path) -> None:
    concepts, whole, output = (tmp_path / name for name in ("concepts", "whole", "out"))
    _write_concepts(concepts)
    began = time.monotonic()
    process = start(arguments(tiny_sd_folder, concepts, whole, **OPTIONS))
    while process.poll() is None and not list(whole.glob("concepts/*/metrics.csv")):
        time.sleep(0.05)
    startup = time.monotonic() - began
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text

    moments, stamps, kills = random.Random(0), dict[Path, int](), 0
    while True:
        process = start(arguments(tiny_sd_folder, concepts, output, **OPTIONS))
        alive_for = moments.uniform(0.3, 2.0) * startup
        if kills == NUM_KILLS:
            break
        try:
            text, _ = process.communicate(timeout=alive_for)
            pytest.fail(
                f"ended with {process.returncode} before it was killed often enough: {text}"
            )
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        files = {path: path.stat().st_mtime_ns for path in output.glob("concepts/*/*.safetensors")}
        final = {p: t for p, t in files.items() if p.name == "catversion.safetensors"}
        # no finished concept was done again
        assert {path: final[path] for path in stamps} == stamps
        stamps = final
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    assert len(stamps) > 0, "no concept was finished between the kills"
    assert final_files(output) == final_files(whole)
    with (output / "index.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["done"] * NUM_CONCEPTS


def _write_concepts(folder: Path) -> None:
    """The three toys again and again, each with a seed of its own."""
    write_toy_concepts(folder)
    toys = sorted(folder.iterdir())
    for number in range(len(toys), NUM_CONCEPTS):
        copy = folder / f"{number:02d}_{toys[number % len(toys)].name}"
        shutil.copytree(toys[number % len(toys)], copy)
        described = json.loads((copy / "concept.json").read_text())
        (copy / "concept.json").write_text(json.dumps({**described, "seed": number}))
