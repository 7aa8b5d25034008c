"""``catversion status RUN``: how far a run is, readable while it goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from catversion_jax.cli.paths import path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="output_dir of a training run"
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything as JSON, an object for each concept"
    )


def run(args: argparse.Namespace) -> int:
    """Print counts, what is under way, and the reasons of what was given up."""
    from catversion_jax.training.run.status import read_status

    found = read_status(args.run)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print_counts(args.run, found)
    if found["locked"] is False:
        running = found["counts"].get("running", 0)
        print("no process is training here now" + (": run its command again" if running else ""))
    elif found["concepts_per_hour"]:
        left = found["counts"].get("queued", 0) + found["counts"].get("running", 0)
        hours = left / found["concepts_per_hour"]
        print(f"{found['concepts_per_hour']:.0f} concepts an hour: about {hours:.1f} h to go")
    for row in found["concepts"]:
        if row["state"] == "running":
            most = found["max_train_steps"]
            # more with retrain=failed, whose budgets the run's options do not say
            of = "" if most is None or row["step"] > most or not most else f" of {most}"
            print(f"  {row['name']}: step {row['step']}{of}")
        elif row["state"] == "quarantined":
            print(f"  {row['name']}: quarantined: {row['reason']}")
    return 0


def print_counts(root: Path, found: dict[str, Any]) -> None:
    """The counts of concepts by state, and of shards; ``found`` is what ``read_status`` says."""
    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items())
    print(f"{root}: {counts or 'no concepts'}")
    if shards := found["shards"]:
        print(
            f"shards: {shards['begun']} of {shards['expected']} have begun, {shards['ended']} are "
            f"done, {shards['locked']} are at work on this machine"
        )
