"""Commands as users run them: in this process or in one of their own, and what they leave."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

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
    """The real program in a process of its own, on one CPU device."""
    # every program is shared with the other tests, also the quickly compiled ones
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **cached, **variables}
    command = [sys.executable, str(ROOT / "train_tpu.py"), *args]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_to_end(args: list[str], **variables: str) -> str:
    """What it printed, when it succeeded."""
    process = start(args, **variables)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    return text


def wait_for(process: subprocess.Popen, pattern: str, output: Path) -> None:
    while process.poll() is None and not list(output.glob(pattern)):
        time.sleep(0.02)


def final_files(output: Path) -> dict[str, bytes]:
    return {
        p.parent.name: p.read_bytes()
        for p in sorted(output.glob("concepts/*/catversion.safetensors"))
    }


def timeline(output: Path) -> list[dict[str, str]]:
    with (output / "timeline.csv").open() as file:
        return list(csv.DictReader(file))


def assert_close(output: Path, reference: Path) -> None:
    """Equal up to the order of sums: within 0.1 % of the distance that 12 steps of 1e-2 can go."""
    for path in reference.glob("concepts/*/catversion.safetensors"):
        one, other = load_concept(path), load_concept(output / path.relative_to(reference))
        assert np.abs(one.learned.key - other.learned.key).max() < 1e-3 * 12 * 1e-2
