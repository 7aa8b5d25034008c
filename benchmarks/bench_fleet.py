"""Many concepts, all costs in: ``python benchmarks/bench_fleet.py OUT``.

Ours: ``train_tpu.py`` on 1, 4, 16, 64 and 256 recoloured example concepts of tiny-sd, a process
each time, with an empty compilation cache: start of Python, compilation, encoding, evaluation
losses, checkpoints and files included. PyTorch: ``torch_trainers.py`` once per concept, as a user
would run it, timed for ``--peers`` concepts in between and multiplied. Both: 200 updates of two
images. A size that is in ``--results`` already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import spread, write_results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "fleet"))
RESULTS = Path(__file__).parent / "results" / "fleet.json"
OPTIONS = {
    "pretrained_model_name_or_path": "tiny-sd",
    "num_positions": 4,
    "scope": "from_class_word",
    "instance_prompt": "a {base_class}",
    "learning_rate": 3e-2,
    "train_batch_size": 2,
    "validation_steps": "null",
    "report_to": "none",
}


def timed(command: list[str], log: Path, env: dict[str, str]) -> dict[str, float]:
    """Wall seconds and peak memory of a process.

    Raises:
      CalledProcessError: it failed.
    """
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=output, stderr=output, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise subprocess.CalledProcessError(status, command, log.read_text()[-2000:])
    unit = 1024 if sys.platform == "linux" else 1
    return {"seconds": seconds, "peak_mb": usage.ru_maxrss * unit / 1e6}


def ours(
    out: Path, count: int, steps: int, per_device: int, *, init: str = "normal"
) -> dict[str, float]:
    """One process, so many concepts."""
    from recoloured import make_concepts

    concepts, run = out / f"concepts-{count}", f"{init}-{steps}-{count}"
    make_concepts(concepts, count)
    options = {
        **OPTIONS,
        "concepts": concepts,
        "output_dir": out / run,
        "init": init,
        "max_train_steps": steps,
        "eval_steps": max(1, min(100, steps)),
        "concepts_per_device": per_device,
        "compilation_cache_dir": out / f"{run}-cache",
    }
    command = [sys.executable, "train_tpu.py", *(f"{k}={v}" for k, v in options.items())]
    # Two virtual devices: one concept's arrays are too small to keep two cores busy.
    env = {"JAX_NUM_CPU_DEVICES": str(min(count, os.cpu_count() or 1))}
    found = timed(command, out / f"{run}.log", env)
    return {**found, "seconds_per_concept": found["seconds"] / count,
            "concept_steps_per_second": count * steps / found["seconds"]}  # fmt: skip


def peer(out: Path, number: int, steps: int) -> dict[str, float]:
    """One PyTorch process, one concept."""
    from recoloured import make_concepts

    make_concepts(out / "peers", number + 1)
    folder = sorted((out / "peers").iterdir())[number]
    command = [
        sys.executable, "benchmarks/torch_trainers.py", "tiny-sd", str(folder),
        "--steps", str(steps), "--out", str(out / f"peer-{number}.safetensors"),
    ]  # fmt: skip
    return timed(command, out / f"peer-{number}.log", {})


def print_against_peers(known: dict[str, Any]) -> None:
    """The table of ``--steps`` updates."""
    alone, low, high = spread([run["seconds"] for run in known["peers"]])
    print(f"PyTorch CatVersion: {alone:.1f} s [{low:.1f}, {high:.1f}] per concept\n")
    print(
        "| concepts | s | s per concept | concept-steps per s | peak MB | PyTorch, times as long |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for count, row in known["ours"].items():
        each = row["seconds_per_concept"]
        print(
            f"| {count} | {row['seconds']:.0f} | {each:.2f} | "
            f"{row['concept_steps_per_second']:.1f} | {row['peak_mb']:.0f} | "
            f"{alone / each:.2f} [{low / each:.2f}, {high / each:.2f}] |"
        )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--per-device", type=int, default=8, help="concepts_per_device [8]")
    parser.add_argument("--peers", type=int, default=3, help="PyTorch runs [3]")
    parser.add_argument("--predicted", type=int, nargs="*", default=[], metavar="UPDATES")
    parser.add_argument("--only-predicted", action="store_true", help="leave out --steps and peers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {"steps": args.steps, "ours": {}, "peers": [], "predicted": {}}
    if args.results.is_file():
        known |= {
            key: value
            for key, value in json.loads(args.results.read_text()).items()
            if key in known
        }
    words = ["OUT" if word == str(args.out) else word for word in sys.argv[1:]]
    known["command"] = " ".join(["python", "benchmarks/bench_fleet.py", *words])
    for count in args.counts:
        per_device = max(1, min(args.per_device, count // 2))
        if len(known["peers"]) < args.peers and not args.only_predicted:
            known["peers"].append(peer(args.out, len(known["peers"]), args.steps))
        if str(count) not in known["ours"] and not args.only_predicted:
            known["ours"][str(count)] = ours(args.out, count, args.steps, per_device)
        for updates in args.predicted:
            row = known["predicted"].setdefault(str(updates), {})
            if str(count) not in row:
                row[str(count)] = ours(args.out, count, updates, per_device, init="predicted")
                write_results(args.results, known)
        write_results(args.results, known)
        print(count, known["ours"].get(str(count), known["predicted"]), flush=True)
    if known["peers"]:
        print_against_peers(known)
    for updates, rows in known["predicted"].items():
        print(f"\n| concepts, predicted and {updates} updates | s | s per concept | peak MB |")
        print("| ---: | ---: | ---: | ---: |")
        for count, row in rows.items():
            cells = (
                f"{row['seconds']:.0f} | {row['seconds_per_concept']:.2f} | {row['peak_mb']:.0f}"
            )
            print(f"| {count} | {cells} |")


if __name__ == "__main__":
    main()
