"""What machine a figure comes from, and how figures are summed up."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("catversion-jax", "jax", "flax", "libtpu", "torch", "diffusers", "transformers")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, accelerators and versions."""
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "python": platform.python_version(),
        **versions,
    }


def interleaved(
    tasks: Mapping[str, Callable[[], Any]], rounds: int, timed: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    """Seconds of every task in every round, one task after the other in each: what else the
    machine does hits all alike.
    """
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(timed(task))
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest."""
    return statistics.median(values), min(values), max(values)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How many times as long theirs took, round by round: median, least and largest."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Figures beside the machine they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": describe_machine(), **results}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
