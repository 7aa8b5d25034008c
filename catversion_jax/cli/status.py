"""``catversion status RUN``: how far a run is, readable while it goes on."""

from __future__ import annotations

import argparse
import collections
import csv
import json
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.bucket_paths import as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run", type=as_path, metavar="RUN", help="output_dir of a training run")
    parser.add_argument("--json", action="store_true", help="everything, one line per concept")


def run(args: argparse.Namespace) -> int:
    """Print counts, what is under way, and the reasons of what was given up."""
    found = read_status(args.run)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items())
    print(f"{args.run}: {counts}")
    if found["locked"] is False:
        running = found["counts"].get("running", 0)
        print("no process is training here now" + (": run its command again" if running else ""))
    elif found["concepts_per_hour"]:
        left = found["counts"].get("queued", 0) + found["counts"].get("running", 0)
        hours = left / found["concepts_per_hour"]
        print(f"{found['concepts_per_hour']:.0f} concepts an hour: about {hours:.1f} h to go")
    for row in found["concepts"]:
        if row["state"] == "running":
            print(f"  {row['name']}: step {row['step']} of {found['max_train_steps']}")
        elif row["state"] == "quarantined":
            print(f"  {row['name']}: quarantined: {row['reason']}")
    return 0


def read_status(root: Path) -> dict[str, Any]:
    """What the files of a run say.

    Raises:
      CatVersionError: it is not a run.
    """
    from catversion_jax.training.run.directory import is_locked

    index, manifest = root / "index.csv", root / "run.json"
    if not index.is_file() or not manifest.is_file():
        raise CatVersionError(
            f"{root}: is not a training run: it has no index.csv. Give the output_dir of one."
        )
    lines = index.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = list(csv.DictReader(lines))
    for row in rows:
        if row["state"] == "running":
            row["step"] = _last_step(root / "concepts" / row["name"] / "metrics.csv")
    options = json.loads(manifest.read_text(encoding="utf-8"))["options"]
    return {
        "counts": dict(collections.Counter(row["state"] for row in rows)),
        "locked": is_locked(root),
        "max_train_steps": options["max_train_steps"],
        "concepts_per_hour": _rate(root / "metrics.jsonl"),
        "concepts": rows,
    }


def _last_step(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    first = lines[-1].split(",")[0] if lines else ""
    return int(first) if first.isdigit() else 0


def _rate(path: Path) -> float:
    """The newest one among the last lines."""
    if not path.is_file():
        return 0.0
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        if '"concepts_per_hour"' in line:
            try:
                return float(json.loads(line)["concepts_per_hour"])
            except ValueError:
                continue  # half a line, still being written
    return 0.0
