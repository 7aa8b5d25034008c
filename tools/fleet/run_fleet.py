"""Train 1,000 concepts of the embedded model in one run, and show how the queue did.

    python tools/fleet/run_fleet.py OUT [--concepts 1000] [--separate 8]

Makes the concepts (the package's examples with shifted hues), trains them in one process while its
memory is watched, trains some of them each in a process of its own, and writes OUT/fleet.json and
OUT/fleet.png. A stage that is finished is not repeated; an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from recoloured import make_concepts
from timeline import draw

TRAIN = Path(__file__).resolve().parents[2] / "train_tpu.py"
# Short trainings: this shows the queue, not what is learned.
OPTIONS = {
    "pretrained_model_name_or_path": "tiny-sd",
    "max_train_steps": 30,
    "num_positions": 4,
    "scope": "from_class_word",
    "learning_rate": 3e-2,
    "early_stop": "plateau",
    "early_stop_eps": 0.01,
    "early_stop_window": 10,
    "early_stop_min_steps": 15,
    "eval_steps": 5,
    "checkpointing_steps": 500,
    "validation_steps": "null",
    "report_to": "none",
}
FLEET = {"JAX_NUM_CPU_DEVICES": "2"}
CONCEPTS_PER_DEVICE = 3


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--concepts", type=int, default=1000)
    parser.add_argument("--separate", type=int, default=8, help="runs of one concept each")
    args = parser.parse_args()
    concepts = args.output / "concepts"
    make_concepts(concepts, args.concepts)
    found = {
        "concepts": args.concepts,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "options": OPTIONS,
        "rows": CONCEPTS_PER_DEVICE * int(FLEET["JAX_NUM_CPU_DEVICES"]),
        "fleet": once(args.output / "fleet-run.json", lambda: fleet(concepts, args.output / "run")),
        "separate": once(
            args.output / "separate.json",
            lambda: separate(concepts, args.output / "separate", args.separate),
        ),
    }
    found["summary"] = summary(found, args.output / "run")
    (args.output / "fleet.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(args.output / "run" / "timeline.csv", found["fleet"]["memory"], args.output / "fleet.png")
    print(json.dumps(found["summary"], indent=1))


def once(path: Path, work: Any) -> Any:
    """What ``work`` returns, or what it returned when it ran before."""
    if not path.exists():
        path.write_text(json.dumps(work()))
    return json.loads(path.read_text())


def start(concepts: Path, output: Path, env: dict[str, str], **options: Any) -> subprocess.Popen:
    """The public command."""
    given = {**OPTIONS, "concepts": concepts, "output_dir": output, **options}
    command = [sys.executable, str(TRAIN)]
    command += [f"{name}={value}" for name, value in given.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)


def fleet(concepts: Path, output: Path) -> dict[str, Any]:
    """All in one process; its resident memory (MB) once a second, with the seconds and the number
    of concepts that were done.
    """
    began = time.perf_counter()
    process = start(concepts, output, FLEET, concepts_per_device=CONCEPTS_PER_DEVICE)
    memory = []
    while process.poll() is None:
        time.sleep(1)
        resident, done = resident_mb(process.pid), lines(output / "timeline.csv") - 1
        if resident:
            memory.append((round(time.perf_counter() - began, 1), max(0, done), resident))
    if process.returncode:
        raise SystemExit(f"{output}: ended with {process.returncode}; see {output}.log")
    return {"seconds": time.perf_counter() - began, "memory": memory}


def separate(concepts: Path, output: Path, count: int) -> list[float]:
    """Seconds of processes that train one concept each; one more before them fills the compilation
    cache and does not count.
    """
    chosen = sorted(concepts.iterdir())[: count + 1]
    seconds = []
    for path in chosen:
        began = time.perf_counter()
        process = start(path, output / path.name, {})
        if process.wait():
            raise SystemExit(f"{output / path.name}: ended with {process.returncode}")
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def summary(found: dict[str, Any], run: Path) -> dict[str, Any]:
    """The figures of the documentation."""
    with (run / "timeline.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    memory = np.array(found["fleet"]["memory"])
    steady = memory[memory[:, 1] >= 50, 2]
    alone = float(np.mean(found["separate"]))
    each = found["fleet"]["seconds"] / found["concepts"]
    return {
        "seconds": round(found["fleet"]["seconds"], 1),
        "seconds_per_concept": round(each, 3),
        "seconds_per_concept_separately": round(alone, 2),
        "separately_range": [round(min(found["separate"]), 2), round(max(found["separate"]), 2)],
        "ratio": round(alone / each, 2),
        "stopped_early": sum(row["outcome"] == "stopped early" for row in rows),
        "concept_steps": sum(int(row["last_step"]) - int(row["first_step"]) for row in rows),
        "time_shares": {k: round(v / sum(last.values()), 4) for k, v in last.items()},
        "memory_mb_at_50_concepts": int(steady[0]),
        "memory_mb_at_the_end": int(steady[-1]),
        "memory_mb_largest_since": int(steady.max()),
    }


def lines(path: Path) -> int:
    """Number of lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resident_mb(pid: int) -> int:
    """Resident memory of a process; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in text.splitlines() if "VmRSS" in line), 0)


if __name__ == "__main__":
    main()
