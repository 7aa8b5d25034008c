"""From the command to the first training step: ``python benchmarks/bench_start.py WORK``.

Starts the quickstart's training with an empty compilation cache, kills it after its first step, and
starts it again, several times. The seconds run from the start of Python to the first row of losses;
beside them stand those of the processor, on which other programs weigh less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import spread, write_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "start.json"


def seconds_to_first_step(work: Path) -> tuple[float, float]:
    """Start, wait for a loss of step 1, and kill: seconds that passed, and of the processor."""
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "output_dir": output,
        "compilation_cache_dir": work / "cache",
        "logging_steps": 1,
        "evaluate_after": "false",
        "validation_steps": "null",
        "report_to": "none",
    }
    command = [sys.executable, str(ROOT / "train_tpu.py"), "--config", "configs/quickstart.yaml"]
    command += [f"{key}={value}" for key, value in options.items()]
    started = time.perf_counter()
    with (work / "log.txt").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    while not any(map(has_stepped, output.glob("concepts/*/metrics.csv"))):
        if process.poll() is not None:
            raise SystemExit(f"ended with {process.returncode}; see {work}/log.txt")
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    process.kill()
    _, _, usage = os.wait4(process.pid, 0)
    return seconds, usage.ru_utime + usage.ru_stime


def has_stepped(path: Path) -> bool:
    """Whether a file of losses has a row beyond that of step 0."""
    return len(path.read_text().splitlines()) > 2


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.work / "cache", ignore_errors=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    first = seconds_to_first_step(args.work)
    again = [seconds_to_first_step(args.work) for _ in range(args.restarts)]
    found = {
        "first start": [round(value, 1) for value in first],
        "restart": [round(spread(values)[0], 1) for values in zip(*again, strict=True)],
    }
    write_results(args.results, {"seconds": found})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
