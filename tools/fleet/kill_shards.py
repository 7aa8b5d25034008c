"""Train shards of a list while they are killed again and again, and compare with nobody killed.

    python tools/fleet/kill_shards.py OUT [--toys] [--concepts 2000] [--shards 8]

Starts the shards as processes, at most so many at once, and sends SIGKILL or SIGTERM to a random
one at random moments until all have ended with code 0. Then it runs every shard once more, left
alone, merges both and compares: every concept file, byte for byte, and index.csv. It also watches
that no file of a concept that was finished is ever written again. Run the same command again after
an interruption: it goes on. With --engine slurm the shards are a job array of
configs/launch/slurm.sbatch, whose tasks are also requeued at random (slurm_one_node.sh starts a
cluster).
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import run_fleet
from recoloured import make_concepts
from run_fleet import start
from slurm_engine import run_array

from catversion_jax.runtime.shards import Shard
from catversion_jax.training.run.merging import merge_shards

# As short as trainings can be that have something to lose: this is about what is not lost.
OPTIONS = {
    "max_train_steps": 10,
    "checkpointing_steps": 4,
    "early_stop": "none",
    "eval_steps": 10,
    "num_eval_samples": 2,
    "concepts_per_device": 4,
}
# Toys are as cheap as a concept can be that is saved half-way: what counts is their number.
TOYS = {
    "max_train_steps": 4,
    "checkpointing_steps": 3,
    "eval_steps": 4,
    "num_eval_samples": 1,
    "train_batch_size": 1,
}
FINISHED = "concepts/*/catversion.safetensors"


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--concepts", type=int, default=2000)
    parser.add_argument(
        "--toys",
        action="store_true",
        help="the tests' toys, each with a seed of its own, on a random model of 5 MB",
    )
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--engine", choices=("processes", "slurm"), default="processes")
    parser.add_argument("--at_once", type=int, default=8, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=30, help="between two kills, in the mean")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))  # its processes end too
    concepts, model = args.output / "concepts", "tiny-sd"
    if args.toys:
        model = args.output / "model"
        make_toys(concepts, model, args.concepts)
    else:
        make_concepts(concepts, args.concepts)
    own = {**OPTIONS, **(TOYS if args.toys else {}), "pretrained_model_name_or_path": model}

    def shard(run: Path, index: int) -> subprocess.Popen:
        return start(concepts, run, {}, **own, shard=f"{index}/{args.shards}")

    killed, alone = args.output / "killed", args.output / "alone"
    moments = random.Random(args.seed)
    if args.engine == "slurm":
        options = {**run_fleet.OPTIONS, **own, "concepts": concepts.resolve()}
        run_array(killed.resolve(), options, args.shards, Log(killed).note, moments, args.seconds)
    else:
        run_all(killed, shard, args, kills=moments)
    run_all(alone, shard, args, kills=None)
    found = {
        "engine": args.engine,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shards": args.shards,
        **count(args.output),
        **compare(killed, alone, names={path.name for path in concepts.iterdir()}),
    }
    (args.output / "kill_shards.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def make_toys(concepts: Path, model: Path, count: int) -> None:
    """Copies of the three toys of the tests, two pictures each, and their model."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from random_model import write_random_model, write_toy_concepts

    if not model.exists():
        write_random_model(model)
    patterns = concepts.with_name("toys")
    if not patterns.exists():
        write_toy_concepts(patterns)
    toys = sorted(patterns.iterdir())
    for number in range(count):
        toy = toys[number % len(toys)]
        copy = concepts / f"{number:04d}_{toy.name}"
        if (copy / "concept.json").exists():
            continue
        left_out = shutil.ignore_patterns("concept.json", "[34].*")
        shutil.copytree(toy, copy, ignore=left_out, dirs_exist_ok=True)
        said = json.loads((toy / "concept.json").read_text())
        (copy / "concept.json").write_text(json.dumps({**said, "seed": number}))


def run_all(
    run: Path,
    shard: Callable[[Path, int], subprocess.Popen],
    args: argparse.Namespace,
    kills: random.Random | None,
) -> None:
    """Run all shards to their end, at most ``at_once`` at a time.

    ``kills`` decides whom to kill and when; None kills nobody.
    """
    log = Log(run)
    waiting = collections.deque(set(range(args.shards)) - log.ended())
    running: dict[int, subprocess.Popen] = {}
    moment = _next(kills, args.seconds)
    try:
        while waiting or running:
            while waiting and len(running) < args.at_once:
                index = waiting.popleft()
                running[index] = shard(run, index)
                log.write("start", index, "")
            time.sleep(0.2)
            for index, process in [*running.items()]:
                code = process.poll()
                if code is None:
                    continue
                del running[index]
                log.note("end", Shard(index, args.shards), code)
                if code in (75, -signal.SIGKILL, -signal.SIGTERM) and kills is not None:
                    waiting.append(index)
                elif code:
                    raise SystemExit(f"shard {index}: ended with {code}; see {run}.log")
            if kills is not None and running and time.monotonic() > moment:
                index = kills.choice([*running])
                name = kills.choice(["SIGKILL", "SIGKILL", "SIGTERM"])
                if running[index].poll() is None:
                    running[index].send_signal(signal.Signals[name])
                    log.write("kill", index, name)
                moment = _next(kills, args.seconds)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _next(kills: random.Random | None, seconds: float) -> float:
    return 0.0 if kills is None else time.monotonic() + kills.expovariate(1 / seconds)


class Log:
    """What happened to the shards of a run, in a file that outlives this program."""

    def __init__(self, run: Path):
        run.parent.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._events = run.with_suffix(".events.csv")
        self._finished = run.with_suffix(".finished.json")
        seen = self._finished.read_text() if self._finished.exists() else "{}"
        self._seen: dict[str, int] = json.loads(seen)

    def write(self, event: str, index: int, detail: object) -> None:
        """Note a start, an end with its code, or a kill with its signal."""
        with self._events.open("a") as file:
            csv.writer(file).writerow([f"{time.time():.1f}", event, index, detail])

    def note(self, event: str, shard: Shard, detail: object) -> None:
        """:meth:`write`, and :meth:`watch` what the shard has finished."""
        self.write(event, shard.index, detail)
        self.watch(shard)

    def rows(self) -> list[list[str]]:
        """(time, event, shard, detail) in order."""
        if not self._events.exists():
            return []
        with self._events.open() as file:
            return list(csv.reader(file))

    def ended(self) -> set[int]:
        """The shards that have ended with code 0."""
        return {int(row[2]) for row in self.rows() if row[1] == "end" and row[3] == "0"}

    def watch(self, shard: Shard) -> None:
        """Make sure that no finished file of a shard was touched since it was seen first."""
        run = self._run
        folder = run / "shards" / shard.folder
        now = {
            path.relative_to(run).as_posix(): path.stat().st_mtime_ns
            for path in folder.glob(FINISHED)
        }
        again = [path for path, moment in now.items() if self._seen.get(path, moment) != moment]
        before = [path for path in self._seen if path.startswith(f"shards/{shard.folder}/")]
        lost = set(before) - set(now)
        if again or lost:
            raise SystemExit(f"{run}: done again: {again[:3]}; lost: {sorted(lost)[:3]}")
        self._seen |= now
        self._finished.write_text(json.dumps(self._seen))


def count(output: Path) -> dict[str, Any]:
    """How often shards were started and killed."""
    events = {name: Log(output / name).rows() for name in ("killed", "alone")}
    kills = collections.Counter(row[3] for row in events["killed"] if row[1] == "kill")
    spans = {name: float(rows[-1][0]) - float(rows[0][0]) for name, rows in events.items()}
    return {
        "kills": sum(kills.values()),
        "signals": dict(kills),
        "starts": sum(row[1] == "start" for row in events["killed"]),
        "starts_alone": sum(row[1] == "start" for row in events["alone"]),
        "seconds": {name: round(span) for name, span in spans.items()},
    }


def compare(one: Path, other: Path, names: set[str]) -> dict[str, Any]:
    """Merge two runs and make sure that they hold the same bytes, of every concept of ``names``."""
    files = [
        {path.parent.name: path for path in run.glob(f"shards/*/{FINISHED}")}
        for run in (one, other)
    ]
    for run, found in zip((one, other), files, strict=True):
        if missing := names - found.keys():
            raise SystemExit(f"{run}: lost {len(missing)} concepts: {sorted(missing)[:5]}")
        if found.keys() - names:
            raise SystemExit(f"{run}: knows concepts that nobody gave")
        merge_shards(run)
    different = [
        name for name in names if files[0][name].read_bytes() != files[1][name].read_bytes()
    ]
    if different:
        raise SystemExit(f"{len(different)} concepts differ: {sorted(different)[:5]}")
    if (one / "index.csv").read_bytes() != (other / "index.csv").read_bytes():
        raise SystemExit("the merged index.csv differs")
    size = sum(path.stat().st_size for path in files[0].values())
    return {"concepts": len(names), "bytes": size, "equal": True}


if __name__ == "__main__":
    main()
