"""The driver that kills shards until all is done, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_killed_shards_give_what_undisturbed_ones_give(tmp_path: Path) -> None:
    """A minute or two: a dozen starts of the command."""
    driver = ROOT / "tools" / "fleet" / "kill_shards.py"
    small = ["--toys", "--concepts", "9", "--shards", "3", "--at_once", "2", "--seconds", "6"]
    process = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), *small],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads((tmp_path / "kill_shards.json").read_text())
    assert (found["concepts"], found["equal"], found["starts_alone"]) == (9, True, 3)
    assert found["kills"] >= 1
    assert found["starts"] > 3
