"""The one command for a day with a GPU, rehearsed on a CPU with tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def gpu_day(out: Path, **env: str) -> dict[str, Any]:
    own = {"DEVICE": "cpu", "PYTHON": sys.executable, **env}
    process = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_day.sh"), str(out)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads((out / "results.json").read_text())


def test_a_part_that_takes_too_long_loses_its_own_figures_only(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text("{}")  # of an earlier day
    found = gpu_day(tmp_path, PARTS="kernels fleet", LIMIT="0.5", TOTAL="60")
    assert list(found) == ["kernels", "fleet"]
    for part in found.values():
        assert (part["exit_code"], part["results"]) == (124, None)


def test_when_the_time_is_up_the_other_parts_are_skipped(tmp_path: Path) -> None:
    found = gpu_day(tmp_path, TOTAL="4")
    assert len(found) == 7
    assert {part["exit_code"] for part in found.values()} == {124}
    assert (tmp_path / "large.log").read_text() == "large: no time is left\n"


def test_the_largest_kernels_are_operations_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from device_trace import largest_kernels

    x = jnp.ones((256, 256))
    program = jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(x).compile()
    found = largest_kernels(lambda: program(x))
    assert 0 < sum(found.values()) <= 1.001
    assert list(found.values()) == sorted(found.values(), reverse=True)
    text = program.as_text()
    assert all(f"%{name} = " in text for name in found)


@pytest.mark.slow
def test_every_part_runs(
    tmp_path: Path, one_block_sd_folder: Path, one_block_xl_folder: Path
) -> None:
    """Minutes: a dozen processes, and torch.compile."""
    models = {"MODEL": str(one_block_sd_folder), "LARGE_MODEL": str(one_block_xl_folder)}
    found = gpu_day(tmp_path, TOTAL="3000", LIMIT="600", **models)
    assert {name: part["exit_code"] for name, part in found.items()} == dict.fromkeys(found, 0)
    results = {name: part["results"] for name, part in found.items()}
    assert max(results["step"]["difference"].values()) < 1e-4
    assert results["images"]["difference"] < 1e-3
    assert set(results["step"]["seconds_per_concept_step"]) == {
        "ours, 1 in one program",
        "ours, 2 in one program",
        "PyTorch CatVersion",
        "PyTorch Textual Inversion",
    }
    assert "PyTorch CatVersion, compiled" in results["compiled"]["seconds_per_concept_step"]
    assert list(results["many"]["seconds_per_concept_step"]) == ["ours, 3 in one program"]
    assert results["large"]["seconds_per_concept_step"]
    assert results["fleet"]["ours"].keys() == {"2"}
    assert len(results["fleet"]["peers"]) == 1
    (kernels,) = results["kernels"]["kernels"].values()
    assert 1 <= len(kernels) <= 10
