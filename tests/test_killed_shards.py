"""The driver that kills shards until all is done, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_model import write_toy_concepts

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_killed_shards_give_what_undisturbed_ones_give(
    one_block_sd_folder: Path, tmp_path: Path
) -> None:
    """A minute or two: a dozen starts of the command."""
    for copy in "abc":
        write_toy_concepts(tmp_path / copy)
        for path in (tmp_path / copy).iterdir():
            (tmp_path / "photos").mkdir(exist_ok=True)
            path.rename(tmp_path / "photos" / f"{copy}_{path.name}")
    driver = ROOT / "tools" / "fleet" / "kill_shards.py"
    own = ["--folder", tmp_path / "photos", "--model", one_block_sd_folder]
    command = [sys.executable, driver, tmp_path / "out", *own, "--shards", "3", "--at_once", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [*map(str, command), "--seconds", "6"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads((tmp_path / "out" / "kill_shards.json").read_text())
    assert (found["concepts"], found["equal"], found["starts_alone"]) == (9, True, 3)
    assert found["kills"] >= 1
    assert found["starts"] > 3
