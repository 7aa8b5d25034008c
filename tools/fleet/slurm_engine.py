"""Shards as a job array of Slurm, whose tasks are disturbed at random; for ``kill_shards.py``."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from catversion_jax.runtime.shards import Shard

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "launch" / "slurm.sbatch"


def run_array(
    run: Path,
    options: Mapping[str, Any],
    num_shards: int,
    note: Callable[[str, Shard, str], None],
    kills: random.Random,
    seconds: float,
) -> None:
    """Submit the array and disturb it until Slurm has nothing of it left.

    Args:
      run: ``output_dir``.
      options: of training, with ``concepts``.
      num_shards: tasks of the array.
      note: is told of each kill: the event, the shard, and what was done.
      kills: decides whom to disturb, how, and when.
      seconds: between two of them, in the mean.
    """
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({k: _plain(v) for k, v in options.items()}))
    own = {
        "CONFIG": str(config),
        "CONCEPTS": str(options["concepts"]),
        "OUT": str(run),
        "VENV": sys.prefix,
        "RETRIES": "1000000",
    }
    log = run.with_suffix(".%a.log")
    command = ["sbatch", "--parsable", f"--array=0-{num_shards - 1}", f"--output={log}"]
    job = _said([*command, str(SCRIPT)], own)
    moment = time.monotonic() + kills.expovariate(1 / seconds)
    while tasks := _tasks(job):
        time.sleep(0.5)
        for index, state in tasks.items():
            if state == "PENDING":  # Slurm lets a task that was queued again wait for two minutes
                _said(["scontrol", "update", f"JobId={job}_{index}", "StartTime=now"], check=False)
        running = [index for index, state in tasks.items() if state == "RUNNING"]
        if running and time.monotonic() > moment:
            index = kills.choice(running)
            how = kills.choice(["requeue", "SIGTERM", "SIGKILL"])
            if how == "requeue":  # as a preemption does
                _said(["scontrol", "requeue", f"{job}_{index}"], check=False)
            elif how == "SIGTERM":  # as the time limit does
                _said(["scancel", "--batch", "--signal=TERM", f"{job}_{index}"], check=False)
            elif not _kill(f"shard={index}/{num_shards}", str(run)):
                how = ""
            if how:
                note("kill", Shard(index, num_shards), how)
            moment = time.monotonic() + kills.expovariate(1 / seconds)


def _plain(value: Any) -> Any:
    text = str(value) if isinstance(value, Path) else value
    return None if text == "null" else text


def _tasks(job: str) -> dict[int, str]:
    """The states of the tasks that Slurm still has to do."""
    lines = _said(
        ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%K %T"], check=False
    )
    return {int(i): state for i, _, state in (line.partition(" ") for line in lines.splitlines())}


def _kill(*words: str) -> bool:
    """SIGKILL the one training process of ours whose command line holds all of ``words``."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if any("train_tpu.py" in part for part in said[:2]) and all(
            any(word in part for part in said) for word in words
        ):
            os.kill(int(folder.name), 9)
            return True
    return False


def _said(
    command: list[str], variables: Mapping[str, str] | None = None, *, check: bool = True
) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout.strip()
