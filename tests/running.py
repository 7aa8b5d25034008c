"""Commands as users run them: in this process or in one of their own, and what they leave."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np

from catversion_jax import load_concept
from catversion_jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
COMPILATION_CACHE = os.environ["CATVERSION_TEST_COMPILATION_CACHE"]  # conftest.py makes it
OPTIONS = {
    "max_train_steps": 12,
    "steps_per_dispatch": 2,
    "checkpointing_steps": 4,
    "eval_steps": 6,
    "num_eval_samples": 2,
    "logging_steps": 2,
    "validation_steps": "null",
    "report_to": "none",
    "concepts_per_device": 2,
    "compilation_cache_dir": COMPILATION_CACHE,
}


def arguments(model: Path, concepts: Path, output: Path, **options: object) -> list[str]:
    merged = {
        "pretrained_model_name_or_path": model,
        "concepts": concepts,
        "output_dir": output,
        **OPTIONS,
        **options,
    }
    return [f"{key}={value}" for key, value in merged.items()]


def run_here(model: Path, concepts: Path, output: Path, **options: object) -> int:
    """Train in this process, on all of its virtual devices; the exit code."""
    return main(["train", *arguments(model, concepts, output, **options)])


def start(args: list[str], **variables: str) -> subprocess.Popen:
    """``train_tpu.py`` in a process of its own, on one CPU device."""
    return _start([str(ROOT / "train_tpu.py"), *args], variables)


def start_command(*args: object, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen:
    """``catversion`` in a process of its own, on one CPU device."""
    program = "import sys; from catversion_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    return _start(["-c", program, *map(str, args)], {}, output)


def _start(
    args: list[str], variables: dict[str, str], output: IO[str] | int = subprocess.PIPE
) -> subprocess.Popen:
    own = {
        "JAX_PLATFORMS": "cpu",
        # every program is shared with the other tests, also the quickly compiled ones
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",  # what it said before it was killed
    }
    return subprocess.Popen(
        [sys.executable, *args],
        env={**os.environ, **own, **variables},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_to_end(args: list[str], **variables: str) -> str:
    """What it printed, when it succeeded."""
    process = start(args, **variables)
    text, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, text
    return text


def wait_for(process: subprocess.Popen, pattern: str, output: Path) -> None:
    """Until the process has written such a file, or has ended."""
    while process.poll() is None and not list(output.glob(pattern)):
        time.sleep(0.02)


def wait_for_steps(process: subprocess.Popen, output: Path, times: int = 1) -> None:
    """Until the process has written metrics so many times, or has ended."""

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in output.glob("concepts/*/metrics.csv")}

    seen = stamps()
    while process.poll() is None and times:
        now = stamps()
        times -= now != seen
        seen = now
        time.sleep(0.01)


def ended(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """The exit code and what it printed."""
    text, _ = process.communicate(timeout=seconds)
    return process.returncode, text


def final_files(output: Path) -> dict[str, bytes]:
    return {
        p.parent.name: p.read_bytes()
        for p in sorted(output.glob("concepts/*/catversion.safetensors"))
    }


def timeline(output: Path) -> list[dict[str, str]]:
    with (output / "timeline.csv").open() as file:
        return list(csv.DictReader(file))


def steps_of(output: Path) -> dict[str, int]:
    """At which step every finished concept was written."""
    paths = sorted(output.glob("concepts/*/catversion.safetensors"))
    return {path.parent.name: load_concept(path).step for path in paths}


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a concept's ``metrics.csv``."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_close(output: Path, reference: Path, leave_out: str = "") -> None:
    """Equal up to the order of sums: within 0.1 % of the distance that 12 steps of 1e-2 can go."""
    for path in reference.glob("concepts/*/catversion.safetensors"):
        if path.parent.name != leave_out:
            one, other = load_concept(path), load_concept(output / path.relative_to(reference))
            for part in ("key", "value"):
                ours, theirs = getattr(one.learned, part), getattr(other.learned, part)
                assert np.abs(ours - theirs).max() < 1e-3 * 12 * 1e-2, (path.parent.name, part)
